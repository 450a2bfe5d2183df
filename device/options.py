"""The options that ``generate``, ``chat`` and ``serve`` share."""

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from common.loopback import is_loopback
from common.standard_paths import may_exist, user_folder
from device.link.curve_keys import CurveKeys
from device.link.probe import endpoint
from device.settings import DEFAULT_UPLINK_K, OUTAGE_SECONDS, DraftSettings, Timeouts, choose_mode
from protocol.bundle import Manifest, QualityFigures
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling

COMMON, SAMPLING, DRAFTING, LINK, OUTPUT = "Common", "Sampling", "Drafting", "Link", "Output"
"""The panels of the help."""
OUTAGES = ("wait", "draft")
"""What an answer does in an outage."""
DRAFTS = ("model", "none")
"""What may draft besides prompt lookup."""
VERIFICATIONS = ("token", "block")
_SYSTEM_BUNDLE = Path("/var/lib/edgedraft/bundle")


def standard_bundle() -> Path:
    """The user's bundle folder; the system's if only that one is there."""
    user = user_folder("XDG_DATA_HOME", ".local/share")
    candidates = [*([user / "edgedraft/bundle"] if user else []), _SYSTEM_BUNDLE]
    return next(filter(may_exist, candidates), candidates[0])


@dataclass(frozen=True)
class AnswerOptions:
    """Where bundle and base station are, how to sample, how to draft, and how long to wait."""

    bundle: Annotated[
        Path,
        typer.Option(
            default_factory=standard_bundle,
            show_default="~/.local/share/edgedraft/bundle or else /var/lib/edgedraft/bundle",
            help="Bundle folder, made by edgedraft-export convert.",
            rich_help_panel=COMMON,
        ),
    ]
    server: Annotated[
        str, typer.Option(help="Endpoint of the base station, tcp://HOST:PORT.", rich_help_panel=LINK)
    ] = "tcp://127.0.0.1:5755"
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1, rich_help_panel=COMMON)] = 512
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.", rich_help_panel=SAMPLING)] = (
        0.0
    )
    top_k: Annotated[
        int, typer.Option(help="Sample from the N most likely tokens; 0 for all.", rich_help_panel=SAMPLING)
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most likely tokens of this probability; 1 for all.", rich_help_panel=SAMPLING
        ),
    ] = 1.0
    seed: Annotated[
        int | None, typer.Option(help="Random seed; a new one each time if omitted.", rich_help_panel=SAMPLING)
    ] = None
    mode: Annotated[
        str,
        typer.Option(
            help="auto, ids, coupled, topk, topp, full or target; auto: ids at temperature 0, else coupled or topk.",
            rich_help_panel=DRAFTING,
        ),
    ] = "auto"
    uplink_k: Annotated[
        int | None,
        typer.Option(
            help="Entries sent of each distribution; default 32 in mode topk, up to 256 in topp.",
            rich_help_panel=DRAFTING,
        ),
    ] = None
    uplink_p: Annotated[
        float,
        typer.Option(
            help="In mode topp, send the fewest likeliest entries of this total probability.", rich_help_panel=DRAFTING
        ),
    ] = 0.95
    uplink_steps: Annotated[
        int,
        typer.Option(help="Send probabilities in steps of 1/N; 0 for the mode's default.", rich_help_panel=DRAFTING),
    ] = 0
    draft_len: Annotated[
        str,
        typer.Option(
            help="Tokens drafted in each round; auto decides after each token from measured times.",
            rich_help_panel=DRAFTING,
        ),
    ] = "auto"
    draft: Annotated[
        str,
        typer.Option(
            help="model: the bundle's draft model; none: prompt lookup alone, the model is not loaded.",
            rich_help_panel=DRAFTING,
        ),
    ] = "model"
    lookup: Annotated[
        bool,
        typer.Option(
            help="Also draft what followed the last tokens earlier in the conversation, where that is faster.",
            rich_help_panel=DRAFTING,
        ),
    ] = True
    verification: Annotated[
        str,
        typer.Option(
            help="In modes topk, topp and full: token accepts drafted tokens one by one, block by their joint "
            "probability.",
            rich_help_panel=DRAFTING,
        ),
    ] = "token"
    drafts_ahead: Annotated[
        str,
        typer.Option(
            help="Drafts sent without waiting for the Verdict before; auto: 0 where both ends share all cores.",
            rich_help_panel=DRAFTING,
        ),
    ] = "auto"
    no_state: Annotated[
        bool,
        typer.Option(
            "--no-state",
            help="Neither use nor keep what earlier calls learnt about the base station and the link.",
            rich_help_panel=DRAFTING,
        ),
    ] = False
    threads: Annotated[
        int, typer.Option(help="Threads of the draft model; 0 for all usable cores.", rich_help_panel=DRAFTING)
    ] = 0
    provider: Annotated[str, typer.Option(help="Execution provider of ONNX Runtime.", rich_help_panel=DRAFTING)] = (
        "CPUExecutionProvider"
    )
    connect_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the base station's first reply.", rich_help_panel=LINK)
    ] = 5.0
    retry_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for a base station that is unreachable, full or shutting down.",
            min=1,
            rich_help_panel=LINK,
        ),
    ] = 60.0
    on_outage: Annotated[
        str,
        typer.Option(
            help=f"wait, or draft: after {OUTAGE_SECONDS:g} s without the base station the draft model goes on alone; "
            "once it answers again it verifies these tokens and replaces those from the first wrong one on.",
            rich_help_panel=LINK,
        ),
    ] = "wait"
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="Use no base station: the draft model answers alone, unverified.", rich_help_panel=LINK
        ),
    ] = False
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="FILE",
            hide_input=True,
            help="This device's secret key, made by keys new.",
            rich_help_panel=LINK,
        ),
    ] = None
    station_key: Annotated[
        str | None,
        typer.Option(help="The base station's public key, or the file that holds it.", rich_help_panel=LINK),
    ] = None
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a JSON line for each round.", rich_help_panel=OUTPUT),
    ] = None

    @property
    def sampling(self) -> Sampling:
        """The sampling; without ``--seed`` each call draws another seed."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_k, self.top_p, seed)

    @property
    def has_draft_model(self) -> bool:
        """Whether the bundle's draft model drafts; otherwise prompt lookup alone.

        Raises:
            SettingsError: ``draft`` is not allowed.
        """
        if self.draft not in DRAFTS:
            raise SettingsError("draft", self.draft, " or ".join(DRAFTS))
        return self.draft == "model"

    def check(self) -> None:
        """Check everything but the model, before it is loaded.

        Raises:
            SettingsError: a value is not allowed.
            KeyFileError: a key file cannot be used.
            BundleError: the bundle's manifest cannot be read.
        """
        self.check_values()
        self.curve_keys()
        endpoint(self.server)

    def check_values(self) -> None:
        """Check everything but the model, the keys and the address.

        Raises:
            SettingsError: a value is not allowed.
            BundleError: the bundle's manifest cannot be read.
        """
        _ = self.has_draft_model
        for name, value, allowed in (
            ("verification", self.verification, VERIFICATIONS),
            ("on-outage", self.on_outage, OUTAGES),
        ):
            if value not in allowed:
                raise SettingsError(name, value, " or ".join(allowed))
        if self.draft == "none" and (self.offline or self.on_outage == "draft"):
            option = "--offline" if self.offline else "--on-outage draft"
            raise SettingsError("draft", self.draft, f"model with {option}, which answers with the draft model alone")
        self.draft_settings(self.sampling)
        _ = self.timeouts

    def draft_settings(
        self,
        sampling: Sampling,
        mode: str | None = None,
        draft_len: str | None = None,
        quality: QualityFigures | None = None,
    ) -> DraftSettings:
        """How to draft for a sampling.

        Args:
            sampling: how the target is sampled.
            mode: another than that of the options.
            draft_len: another than that of the options.
            quality: figures of the loaded bundle; None reads them from its manifest where they are needed.

        Raises:
            SettingsError: a value is not allowed.
            BundleError: the bundle's manifest cannot be read.
        """
        chosen = self._mode_for(sampling, mode or self.mode, quality)
        uplink_k = DEFAULT_UPLINK_K.get(chosen, 1) if self.uplink_k is None else self.uplink_k
        return DraftSettings(
            chosen,
            sampling,
            uplink_k,
            draft_len=_number_or_auto("draft-len", draft_len or self.draft_len, 1),
            uplink_p=self.uplink_p,
            uplink_steps=self.uplink_steps,
            drafts_ahead=self._drafts_ahead,
            lookup=self.lookup,
            block_verification=self.verification == "block",
        )

    @property
    def _drafts_ahead(self) -> int | None:
        """None where ``auto`` stands for as many as possible; 0 where both ends would compete for the same cores."""
        number = _number_or_auto("drafts-ahead", self.drafts_ahead, 0)
        shares_cores = is_loopback(self.server) and len(os.sched_getaffinity(0)) == os.cpu_count()
        return 0 if number is None and shares_cores else number

    @property
    def timeouts(self) -> Timeouts:
        """How long to wait for the base station."""
        outage = OUTAGE_SECONDS if self.on_outage == "draft" else None
        return Timeouts(self.connect_timeout, retry=self.retry_timeout, outage=0.0 if self.offline else outage)

    def curve_keys(self) -> CurveKeys | None:
        """The keys of the link, both or none: without the station's key anybody could pose as the base station.

        Raises:
            SettingsError: one key is given without the other.
            KeyFileError: a key file cannot be used.
        """
        if self.key is None and self.station_key is None:
            return None
        if self.key is None:
            raise SettingsError("key", None, "a file that keys new made; --station-key needs it")
        if self.station_key is None:
            raise SettingsError("station-key", None, "the base station's public key or its file; --key needs it")
        return CurveKeys.read(self.key, self.station_key)

    def _mode_for(self, sampling: Sampling, name: str, quality: QualityFigures | None) -> Mode:
        if name not in ("auto", *Mode):
            raise SettingsError("mode", name, f"auto, {', '.join(Mode)}")
        mode = choose_mode(quality or Manifest.read(self.bundle).quality, sampling) if name == "auto" else Mode(name)
        if mode is Mode.IDS and not sampling.greedy:
            raise SettingsError(
                "mode", name, f"coupled, topk, topp, full or target at temperature {sampling.temperature:g}"
            )
        return mode


def _number_or_auto(option: str, text: str, least: int) -> int | None:
    """The number, or None for ``auto``.

    Raises:
        SettingsError: it is neither.
    """
    if text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise SettingsError(option, text, f"auto, or {least} or more")
    return int(text)
