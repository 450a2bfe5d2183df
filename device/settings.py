"""How the device drafts, how much of each distribution it sends, and how long it waits.

Settings are validated when they are made.
"""

from dataclasses import dataclass
from typing import Self

from protocol.bundle import QualityFigures
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling
from protocol.sparse import MAX_STEPS

DEFAULT_UPLINK_K = {Mode.TOPK: 32, Mode.TOPP: 256}
"""Most entries sent of each distribution, unless the user asks for another number."""
STEPS_PER_ENTRY = {Mode.TOPK: 24, Mode.TOPP: 16}
"""Chosen with ``edgedraft-bench encodings``; a top-p support is mostly far smaller than its limit."""
OUTAGE_SECONDS = 5.0
"""Without a message of the base station for so long, ``--on-outage draft`` goes on with the draft model alone."""
_TOPK_GAIN = 0.05
"""Acceptance that ``topk`` must add to be worth thirty times the bytes: about a tenth more tokens per second."""


@dataclass(frozen=True)
class UplinkSettings:
    """How much of a distribution is sent in modes ``topk`` and ``topp``.

    At most ``k`` entries: the most likely ones that reach the probability ``p``,
    quantised to steps of 1/``steps``.
    """

    k: int
    p: float
    steps: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise SettingsError("uplink-k", self.k, "1 or more")
        if not 0 < self.p <= 1:
            raise SettingsError("uplink-p", self.p, "above 0, up to 1 (all of the K entries)")
        if not 1 <= self.steps <= MAX_STEPS:
            raise SettingsError("uplink-steps", self.steps, f"1 to {MAX_STEPS}")

    @classmethod
    def of_mode(cls, mode: Mode, k: int, p: float, steps: int) -> Self:
        """Settings of a mode: ``p`` counts in ``topp`` alone, and ``steps`` 0 selects the mode's default."""
        chosen = steps or min(STEPS_PER_ENTRY.get(mode, 1) * k, MAX_STEPS)
        return cls(k, p if mode is Mode.TOPP else 1.0, chosen)


@dataclass(frozen=True)
class DraftSettings:
    """How the device drafts.

    Attributes:
        mode: what is sent for each drafted token.
        sampling: how the target is sampled.
        uplink_k: entries sent of each distribution in modes ``topk`` and ``topp``.
        draft_len: most tokens drafted in a round; None lets the planner decide.
        uplink_p: probability that the entries sent in mode ``topp`` reach.
        uplink_steps: probabilities are sent in steps of 1/``uplink_steps``; 0 selects the mode's default.
        cache_last_token: run the last drafted token through the draft model while waiting for the Verdict; off where
            that takes time from a base station on the same core.
        drafts_ahead: most Drafts sent on an assumed bonus token, while another is in flight; None for as many as the
            planner and the base station's window allow.
        lookup: also draft by prompt lookup, where the planner expects more of it; with a fixed ``draft_len`` only where
            the draft model cannot draft.
        block_verification: ask for it, in modes that send distributions.
    """

    mode: Mode
    sampling: Sampling
    uplink_k: int
    draft_len: int | None
    uplink_p: float = 0.95
    uplink_steps: int = 0
    cache_last_token: bool = True
    drafts_ahead: int | None = 0
    lookup: bool = False
    block_verification: bool = False

    def __post_init__(self) -> None:
        _ = self.uplink  # raises if a value is not allowed

    @property
    def asks_block_verification(self) -> bool:
        """Whether to open sessions with it: only modes that send distributions have it."""
        return self.block_verification and self.mode.encoding is not None

    @property
    def uplink(self) -> UplinkSettings:
        """How much of each distribution is sent.

        Raises:
            SettingsError: a value is not allowed.
        """
        return UplinkSettings.of_mode(self.mode, self.uplink_k, self.uplink_p, self.uplink_steps)


@dataclass(frozen=True)
class Timeouts:
    """Times in seconds.

    Attributes:
        connect: until the base station must have answered the first Hello.
        resend: until an unanswered request is sent again.
        retry: until the device gives up on a base station that is unreachable, full or shutting down.
        outage: until the draft model goes on alone where no message arrives; None for never.

    Raises:
        SettingsError: a time is not allowed.
    """

    connect: float = 5.0
    resend: float = 5.0
    retry: float = 60.0
    outage: float | None = None

    def __post_init__(self) -> None:
        for name in ("connect", "resend", "retry"):
            seconds = getattr(self, name)
            if not seconds > 0:
                raise SettingsError(f"{name}-timeout", seconds, "more than 0 seconds")


def choose_mode(quality: QualityFigures, sampling: Sampling) -> Mode:
    """The mode that ``auto`` stands for.

    ``ids`` at temperature 0. Above it ``coupled``, unless the quality check measured that
    ``topk`` accepts more by ``_TOPK_GAIN``.
    """
    if sampling.greedy:
        return Mode.IDS
    gain = quality.topk_acceptance - quality.coupled_acceptance
    return Mode.TOPK if gain > _TOPK_GAIN else Mode.COUPLED
