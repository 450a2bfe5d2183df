"""``edgedraft-device``: answers by distributed speculative decoding."""

import json
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from common.command_line import application, run
from common.configuration import came_from_file, configured_group
from common.key_files import public_path
from common.option_groups import with_options
from device.answers.answer import Conversation
from device.chat import Chat
from device.doctor import Doctor
from device.drafting.draft_model import SequenceModel
from device.drafting.load_model import load_model
from device.drafting.no_draft_model import NoDraftModel
from device.link.curve_keys import CurveKeys, new_key, public_key
from device.link.link import Link
from device.link.no_link import NoLink
from device.options import COMMON, OUTPUT, AnswerOptions
from device.planning.planner_store import PlannerStore
from device.planning.planners import Planners
from device.session.client import Client
from device.session.round_records import RoundRecordFile
from device.state_folder import state_folder
from device.terminal import AnswerDisplay, console, show_figures
from device.text.tokenizer import ChatMessage, Tokenizer
from device.text.unicode import check_unicode
from protocol.bundle import Manifest
from protocol.errors import LinkError, SettingsError
from protocol.frames import FrameCodec

logger = logging.getLogger(__name__)

app = application(
    "The device: drafts tokens, has the base station verify them, and prints the answer.", configured_group("device")
)
keys_app = typer.Typer(help="The keys of this device.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

SERVICE = "Service"
SystemPrompt = Annotated[
    str | None, typer.Option("--system", help="The system prompt; not used with --raw.", rich_help_panel=COMMON)
]
ShowOrigins = Annotated[
    bool,
    typer.Option(
        help="Color tokens: accepted green, recovered red, bonus blue, target alone magenta, prompt lookup cyan; "
        "unverified ones are always yellow.",
        rich_help_panel=OUTPUT,
    ),
]


@app.command()
@with_options(AnswerOptions)
def generate(
    answer_options: AnswerOptions,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; standard input if there is none.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, as an option.", rich_help_panel=COMMON)] = None,
    system: SystemPrompt = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Use the prompt as it is, without the chat template.", rich_help_panel=COMMON),
    ] = False,
    origins: ShowOrigins = False,
    explain: Annotated[
        bool,
        typer.Option(
            help="Print each decision of the planner with the estimates behind it, to stderr.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Answer one prompt; the text streams as it is committed."""
    if explain:
        logging.basicConfig(format="%(message)s")
        for name in ("device.session.session", "device.session.draft_rounds"):
            logging.getLogger(name).setLevel(logging.DEBUG)
    asked = _prompt(text, prompt)
    messages = _messages(asked, system)
    with _conversation(answer_options) as conversation:
        tokenizer = conversation.tokenizer
        ids = tokenizer.encode(asked) if raw else tokenizer.encode_chat(messages)
        display = AnswerDisplay(origins, quiet=as_json)
        stream = conversation.ask(ids, answer_options.max_new_tokens, show_unverified=display.show_unverified)
        for chunk in stream:
            display.show(chunk)
    if as_json:
        sys.stdout.write(json.dumps(asdict(stream.answer)) + "\n")
    else:
        console.print()
        show_figures(stream.answer)


@app.command()
@with_options(AnswerOptions)
def chat(answer_options: AnswerOptions, system: SystemPrompt = None, origins: ShowOrigins = False) -> None:
    """Chat; each turn sends and runs only what is new. An empty line or Ctrl-D ends, Ctrl-C stops an answer.

    A backslash at the end of a line continues it. /reset forgets all turns; /system TEXT also sets the system prompt.
    """
    if system is not None:
        check_unicode("system", system)
    with _conversation(answer_options) as conversation:
        Chat(conversation, answer_options.max_new_tokens, origins, system).run()


@app.command()
@with_options(AnswerOptions)
def serve(
    answer_options: AnswerOptions,
    context: typer.Context,
    bind: Annotated[
        str, typer.Option(help="Address to listen on; port 0 selects a free one.", rich_help_panel=SERVICE)
    ] = "http://127.0.0.1:8080",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            "--api-key",
            metavar="FILE",
            hide_input=True,
            help="File with the API key that clients must send, or set EDGEDRAFT_API_KEY; required beyond loopback.",
            rich_help_panel=SERVICE,
        ),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Origin of web pages that may send requests, https://HOST[:PORT]; repeatable.",
            rich_help_panel=SERVICE,
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(help="Name of the model in the API; default the bundle's.", rich_help_panel=SERVICE),
    ] = None,
    cache_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of all conversations that are kept; the last one may exceed them alone.",
            min=1,
            rich_help_panel=SERVICE,
        ),
    ] = 8192,
) -> None:
    """Serve a chat page and OpenAI's completions API over HTTP until interrupted; the options are the defaults."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    answer_options.check()
    from prometheus_client import disable_created_metrics

    from device.answers.metrics import Metrics
    from device.answers.worker import Worker
    from device.http import http_server
    from device.http.answer_fields import Defaults
    from device.http.api_key import VARIABLE, read_api_key
    from device.http.origin_check import check_origins

    is_overridden = came_from_file(context, "api_key_file") and VARIABLE in os.environ
    key = read_api_key(None if is_overridden else api_key_file)
    check_origins(cors_origins or [])  # before the model is loaded
    http_server.check_bind(bind, key)
    http_server.check_free(bind)
    with _record_file(answer_options) as records:
        model, tokenizer = _load(answer_options)
        logging.getLogger("device").info("loaded %s", answer_options.bundle)
        # Without it, each counter has a second series with the time it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        metrics = Metrics()
        connect = partial(_connect, answer_options, model.manifest, records, metrics.watch_link)
        planners = _planners(answer_options, model.manifest)
        offline = answer_options.offline
        worker = Worker(model, tokenizer, connect, cache_tokens, metrics=metrics, planners=planners, offline=offline)
        defaults = Defaults(
            answer_options.temperature,
            answer_options.top_k,
            answer_options.top_p,
            answer_options.seed,
            answer_options.max_new_tokens,
            answer_options.mode,
            answer_options.draft_len,
            partial(answer_options.draft_settings, quality=model.manifest.quality),
        )
        http_server.serve(worker, alias or model.manifest.name, defaults, bind, key, cors_origins or [])


@app.command()
@with_options(AnswerOptions)
def doctor(
    answer_options: AnswerOptions,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line per check.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Check bundle, board, link and base station, and predict tokens per second; the exit code is 1 if a check fails.

    A failed check names the fault and what to do; checks that depend on it are not made.
    """
    with _record_file(answer_options) as records:
        greeting = replace(answer_options, on_outage="wait", offline=False)
        healthy = Doctor(answer_options, partial(_connect, greeting, records=records), as_json).run()
    if not healthy:
        raise typer.Exit(1)


@keys_app.command()
def new(file: Annotated[Path, typer.Argument(metavar="FILE", help="File for the secret key.")]) -> None:
    """Make a key pair for this device: FILE is secret, FILE.pub is for the base station."""
    created = new_key(file)
    typer.echo(f"public key: {created}\nit is also in {public_path(file)}; at the base station, run:")
    typer.echo(f"edgedraft-basestation keys enroll DIR NAME {shlex.quote(created)}")


@keys_app.command("show")
def show_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of the secret key, made by keys new.")],
) -> None:
    """Print the public key of this device, which the base station enrolls."""
    typer.echo(public_key(file))


def main() -> None:
    """Run the command line."""
    run(app, "device")


@contextmanager
def _conversation(answer_options: AnswerOptions) -> Iterator[Conversation]:
    """A conversation over a new link; both are closed at the end."""
    answer_options.check()
    settings = answer_options.draft_settings(answer_options.sampling)
    with _record_file(answer_options) as records:
        model, tokenizer = _load(answer_options)
        warn = partial(logger.warning, "%s")
        with closing(_connect(answer_options, model.manifest, records, on_unresolved=warn)) as client:
            planners = _planners(answer_options, model.manifest)
            conversation = Conversation(client, planners, model, tokenizer, settings)
            with closing(conversation):
                yield conversation


def _load(answer_options: AnswerOptions) -> tuple[SequenceModel, Tokenizer]:
    model: SequenceModel
    if answer_options.has_draft_model:
        model = load_model(answer_options.bundle, answer_options.threads, (answer_options.provider,))
    else:
        model = NoDraftModel(Manifest.read(answer_options.bundle))
    return model, Tokenizer(answer_options.bundle, model.manifest)


def _planners(answer_options: AnswerOptions, manifest: Manifest) -> Planners:
    """New planners, which start from what earlier processes learnt."""
    if answer_options.no_state:
        return Planners(manifest.target_quality)
    store = PlannerStore(state_folder() / "planner", manifest, answer_options.server)
    return Planners(manifest.target_quality, store=store)


def _record_file(answer_options: AnswerOptions) -> AbstractContextManager[RoundRecordFile | None]:
    return closing(RoundRecordFile(answer_options.record)) if answer_options.record else nullcontext()


def _connect(
    answer_options: AnswerOptions,
    manifest: Manifest,
    records: RoundRecordFile | None,
    on_link: Callable[[Link], None] = lambda _: None,
    on_unresolved: Callable[[LinkError], None] = lambda _: None,
) -> Client:
    """Open a link, report it to ``on_link``, and greet the base station over it unless outages are bridged.

    ``on_unresolved`` is told why its name does not resolve, where that is no error.
    """
    keys = answer_options.curve_keys()
    link = _link(answer_options, manifest, keys, on_unresolved)
    on_link(link)
    first_session = secrets.randbits(31) if keys else 0  # processes of one device may share its key
    try:
        return Client(link, manifest, answer_options.timeouts, records=records, first_session=first_session)
    except BaseException:
        link.close()
        raise


def _link(
    answer_options: AnswerOptions,
    manifest: Manifest,
    keys: CurveKeys | None,
    on_unresolved: Callable[[LinkError], None],
) -> Link:
    """A link to the base station; none if none is used. In an outage its name may resolve later."""
    if answer_options.offline:
        return NoLink("--offline")
    address, codec = answer_options.server, FrameCodec(manifest.vocab_size)
    try:
        return Link.connect(address, codec, keys)
    except LinkError as error:
        if answer_options.timeouts.outage is None:
            raise
        on_unresolved(error)
        return Link.connect(address, codec, keys, ipv6=False)


def _prompt(text: str | None, option: str | None) -> str:
    """The prompt, from the argument, the option or standard input."""
    if text is not None and option is not None:
        raise SettingsError("prompt", option, "left out beside a prompt as argument")
    prompt = text if text is not None else option
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n") or None
    if prompt is None:
        raise SettingsError("prompt", None, "a text as argument, with --prompt or on standard input")
    check_unicode("prompt", prompt)
    return prompt


def _messages(prompt: str, system: str | None) -> list[ChatMessage]:
    question: ChatMessage = {"role": "user", "content": prompt}
    if system is None:
        return [question]
    check_unicode("system", system)
    return [{"role": "system", "content": system}, question]
