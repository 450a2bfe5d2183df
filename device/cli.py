"""``edgedraft-device``: answers by distributed speculative decoding."""

import json
import logging
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from common.command_line import Verbose, run
from common.key_files import public_path
from device.answer import Answer, AnswerStream, Conversation
from device.client import Client, Timeouts
from device.curve_keys import LinkKeys, new_key
from device.draft_model import DraftModel
from device.link import Link
from device.round_records import RoundRecordFile
from device.sampling import ENTRIES, best_mode
from device.session import DraftSettings, Origin
from device.tokenizer import ChatMessage, Tokenizer
from protocol.bundle import Manifest
from protocol.errors import SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling

ORIGIN_STYLES = {Origin.ACCEPTED: "green", Origin.RECOVERED: "bold red", Origin.BONUS: "bold blue"}

app = typer.Typer(
    add_completion=False, help="The device: drafts, asks the base station, commits what stands.", no_args_is_help=True
)
keys_app = typer.Typer(help="The keys of this device.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
console = Console(highlight=False, soft_wrap=True)

BundleOption = Annotated[Path, typer.Option(help="Folder that edgedraft-export convert wrote.")]
ServerOption = Annotated[str, typer.Option(help="Endpoint of the base station.")]
MaxNewTokens = Annotated[int, typer.Option(help="The answer's length at most, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Sample among the N likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens of this mass; 1: all.")]
Seed = Annotated[int | None, typer.Option(help="Of all random numbers; left out, a new one each time.")]
ModeOption = Annotated[
    str,
    typer.Option(
        help="auto, ids, coupled, topk, topp, full or target; auto: ids at temperature 0, else coupled or topk."
    ),
]
UplinkK = Annotated[
    int | None, typer.Option(help="Entries sent of each distribution; left out, 32 in mode topk, up to 256 in topp.")
]
UplinkP = Annotated[float, typer.Option(help="Probability that the entries sent in mode topp reach.")]
UplinkSteps = Annotated[int, typer.Option(help="Probabilities are sent in steps of 1/N; 0: as the mode needs.")]
DraftLen = Annotated[
    str, typer.Option(help="Tokens drafted in a round; auto drafts while another is worth its time, as measured.")
]
Threads = Annotated[int, typer.Option(help="Threads of the draft model; 0: all cores.")]
Provider = Annotated[str, typer.Option(help="Execution provider of ONNX Runtime.")]
ConnectTimeout = Annotated[float, typer.Option(help="Seconds to wait for the base station's first word.")]
PatienceOption = Annotated[
    float, typer.Option(help="Seconds to wait for a base station that is silent, full or being stopped.", min=1)
]
KeyOption = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="This device's key, of keys new.")]
StationKey = Annotated[str | None, typer.Option(help="The base station's public key, or the file that holds it.")]
RecordOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Add a JSON line for every round.")]
ShowOrigins = Annotated[bool, typer.Option(help="Colour tokens: accepted green, recovered red, bonus blue.")]


@dataclass(frozen=True)
class _Place:
    """Where draft model and base station are."""

    bundle: Path
    server: str
    threads: int
    provider: str
    patience: Timeouts
    keys: LinkKeys | None
    record: Path | None


@app.callback()
def options(verbose: Verbose = False) -> None:
    """The device: drafts, asks the base station, commits what stands."""


@app.command()
def generate(
    bundle: BundleOption,
    server: ServerOption,
    prompt: Annotated[str, typer.Option(help="What to answer; put through the chat template.")],
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    mode: ModeOption = "auto",
    uplink_k: UplinkK = None,
    uplink_p: UplinkP = 0.95,
    uplink_steps: UplinkSteps = 0,
    draft_len: DraftLen = "auto",
    threads: Threads = 0,
    provider: Provider = "CPUExecutionProvider",
    connect_timeout: ConnectTimeout = 5.0,
    patience: PatienceOption = 60.0,
    key: KeyOption = None,
    station_key: StationKey = None,
    record: RecordOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without chat template.")] = False,
    origins: ShowOrigins = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Answer one prompt; the text streams as it is committed."""
    settings = _settings(
        bundle, _sampling(temperature, top_k, top_p, seed), mode, (uplink_k, uplink_p, uplink_steps), draft_len
    )
    _at_least_one("max-new-tokens", max_new_tokens)
    waits = Timeouts(connect_timeout, reply=patience)
    place = _Place(bundle, server, threads, provider, waits, _keys(key, station_key), record)
    with _conversation(place, settings) as conversation:
        tokenizer = conversation.tokenizer
        ids = tokenizer.encode(prompt) if raw else tokenizer.encode_chat([{"role": "user", "content": prompt}])
        answer = _show(conversation.ask(ids, max_new_tokens), origins, quiet=as_json)
    if as_json:
        sys.stdout.write(json.dumps(asdict(answer)) + "\n")


@app.command()
def chat(
    bundle: BundleOption,
    server: ServerOption,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    mode: ModeOption = "auto",
    uplink_k: UplinkK = None,
    uplink_p: UplinkP = 0.95,
    uplink_steps: UplinkSteps = 0,
    draft_len: DraftLen = "auto",
    threads: Threads = 0,
    provider: Provider = "CPUExecutionProvider",
    connect_timeout: ConnectTimeout = 5.0,
    patience: PatienceOption = 60.0,
    key: KeyOption = None,
    station_key: StationKey = None,
    record: RecordOption = None,
    origins: ShowOrigins = False,
) -> None:
    """Talk; each turn sends and runs only what is new. An empty line or Ctrl-D ends."""
    settings = _settings(
        bundle, _sampling(temperature, top_k, top_p, seed), mode, (uplink_k, uplink_p, uplink_steps), draft_len
    )
    _at_least_one("max-new-tokens", max_new_tokens)
    messages: list[ChatMessage] = []
    waits = Timeouts(connect_timeout, reply=patience)
    place = _Place(bundle, server, threads, provider, waits, _keys(key, station_key), record)
    with _conversation(place, settings) as conversation:
        for line in _lines():
            messages.append({"role": "user", "content": line})
            ids = conversation.tokenizer.encode_chat(messages)
            answer = _show(conversation.ask(ids, max_new_tokens), origins, quiet=False)
            messages.append({"role": "assistant", "content": answer.text})


@app.command()
def serve(
    bundle: BundleOption,
    server: ServerOption,
    bind: Annotated[str, typer.Option(help="Address to listen at; port 0 takes a free one.")] = "http://127.0.0.1:8080",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Answer everybody who can reach the address, whoever that is.")
    ] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    mode: ModeOption = "auto",
    uplink_k: UplinkK = None,
    uplink_p: UplinkP = 0.95,
    uplink_steps: UplinkSteps = 0,
    draft_len: DraftLen = "auto",
    threads: Threads = 0,
    provider: Provider = "CPUExecutionProvider",
    connect_timeout: ConnectTimeout = 5.0,
    patience: PatienceOption = 60.0,
    key: KeyOption = None,
    station_key: StationKey = None,
    record: RecordOption = None,
) -> None:
    """Answer programs over HTTP, as OpenAI's chat completions, until interrupted.

    Requests may set temperature, top_p, seed, stop and max_tokens; the options hold where they do not.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    uplink = (uplink_k, uplink_p, uplink_steps)
    settings = partial(_settings, bundle, mode=mode, uplink=uplink, draft_len=draft_len)
    settings(_sampling(temperature, top_k, top_p, seed))  # raises what is wrong with them
    _at_least_one("max-new-tokens", max_new_tokens)
    waits = Timeouts(connect_timeout, reply=patience)
    place = _Place(bundle, server, threads, provider, waits, _keys(key, station_key), record)
    from device import http
    from device.chat_request import Defaults
    from device.worker import Worker

    http.check_bind(bind, insecure)  # before what takes long
    with _records(place) as records:
        model, tokenizer = _load(place)
        logging.getLogger("device").info("loaded %s", bundle)
        worker = Worker(model, tokenizer, partial(_connect, place, model.manifest, records))
        defaults = Defaults(temperature, top_k, top_p, seed, max_new_tokens, settings)
        http.serve(worker, model.manifest.name, defaults, bind, insecure)


@keys_app.command()
def new(file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write the secret key to.")]) -> None:
    """Make a key pair for this device: FILE for it alone, FILE.pub for the base station."""
    public_key = new_key(file)
    typer.echo(f"public key: {public_key}\nit is also in {public_path(file)}; at the base station, run:")
    typer.echo(f"edgedraft-basestation keys enroll DIR NAME {shlex.quote(public_key)}")


def main() -> None:
    """Run the command line."""
    run(app, "device")


def _sampling(temperature: float, top_k: int, top_p: float, seed: int | None) -> Sampling:
    return Sampling(temperature, top_k, top_p, secrets.randbits(63) if seed is None else seed)


def _settings(
    bundle: Path, sampling: Sampling, mode: str, uplink: tuple[int | None, float, int], draft_len: str
) -> DraftSettings:
    if mode not in ("auto", *Mode):
        raise SettingsError("mode", mode, f"auto, {', '.join(Mode)}")
    chosen = best_mode(Manifest.read(bundle).quality, sampling) if mode == "auto" else Mode(mode)
    if chosen is Mode.IDS and not sampling.greedy:
        raise SettingsError(
            "mode", mode, f"coupled, topk, topp, full or target at temperature {sampling.temperature:g}"
        )
    uplink_k, uplink_p, uplink_steps = uplink
    if uplink_k is None:
        uplink_k = ENTRIES.get(chosen, 1)
    return DraftSettings(chosen, sampling, uplink_k, _draft_len(draft_len), uplink_p, uplink_steps)


def _keys(key: Path | None, station_key: str | None) -> LinkKeys | None:
    """Both keys or none: without the station's, anybody could pose as it."""
    if key is None and station_key is None:
        return None
    if key is None:
        raise SettingsError("--key", None, "a file that keys new made, together with --station-key")
    if station_key is None:
        raise SettingsError("--station-key", None, "a public key or its file, together with --key")
    return LinkKeys.read(key, station_key)


def _draft_len(value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise SettingsError("draft-len", value, "auto, or 1 and more")
    return int(value)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise SettingsError(name, value, "1 and more")


@contextmanager
def _conversation(place: _Place, settings: DraftSettings) -> Iterator[Conversation]:
    """A conversation over a fresh link; both are closed whatever happens."""
    with _records(place) as records:
        model, tokenizer = _load(place)
        link, client = _connect(place, model.manifest, records)
        try:
            conversation = Conversation(link, client, model, tokenizer, settings)
            try:
                yield conversation
            finally:
                conversation.close()
        finally:
            link.close()


def _load(place: _Place) -> tuple[DraftModel, Tokenizer]:
    model = DraftModel(place.bundle, place.threads, (place.provider,))
    return model, Tokenizer(place.bundle, model.manifest)


def _records(place: _Place) -> AbstractContextManager[RoundRecordFile | None]:
    return closing(RoundRecordFile(place.record)) if place.record else nullcontext()


def _connect(place: _Place, manifest: Manifest, records: RoundRecordFile | None) -> tuple[Link, Client]:
    """A link, and the base station greeted over it."""
    link = Link.connect(place.server, FrameCodec(manifest.vocab_size), place.keys)
    # a device may run several times at once with one key
    first_session = secrets.randbits(31) if place.keys else 0
    try:
        return link, Client(link, manifest, place.patience, records=records, first_session=first_session)
    except BaseException:
        link.close()
        raise


def _show(stream: AnswerStream, origins: bool, quiet: bool) -> Answer:
    for piece in stream:
        if not quiet:
            console.print(Text(piece.text, style=ORIGIN_STYLES[piece.origin] if origins else ""), end="")
    if not quiet:
        console.print()
    return stream.answer


def _lines() -> Iterator[str]:
    """What the user types, until an empty line or the end."""
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except EOFError:
            console.print()
            return
        if not line.strip():
            return
        yield line
