"""``edgedraft-bench``: every figure of the documentation comes from one of these commands."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from protocol.command_line import Verbose, run
from protocol.messages import Sampling

app = typer.Typer(add_completion=False, help="Measure this system against its alternatives.", no_args_is_help=True)
console = Console(highlight=False)

BundleOption = Annotated[Path, typer.Option(help="Bundle of the draft model.")]
TargetOption = Annotated[str, typer.Option(help="The target: model folder, hub name or .gguf file.")]
PromptsOption = Annotated[Path | None, typer.Option(help="Spec-Bench jsonl file; left out, the project's own prompts.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
RateOption = Annotated[float, typer.Option(help="Mbit/s.")]
DelayOption = Annotated[float, typer.Option(help="Milliseconds, one way.")]
JitterOption = Annotated[float, typer.Option(help="Up to so many milliseconds more, at random.")]
OUTAGE = "START:SECONDS, from the relay's start; may be repeated."
DtypeOption = Annotated[str, typer.Option(help="Of the target: auto, float32 or bfloat16.")]


@app.callback()
def options(verbose: Verbose = False) -> None:
    """Measure this system against its alternatives."""


@app.command()
def demo(bundle: BundleOption, target: TargetOption, dtype: DtypeOption = "bfloat16") -> None:
    """Stream an answer in colour, then show what drafting was worth."""
    from bench.demo import show_demo
    from bench.station import running_station
    from bench.workplace import workplace

    with ExitStack() as stack:
        with console.status("starting a base station"):
            place = stack.enter_context(workplace(bundle, stack.enter_context(running_station(target, dtype))))
        show_demo(place, console)
    console.print("next: edgedraft-device chat, or edgedraft-bench speedup (see README.md)")


@app.command()
def speedup(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens for each.")] = 128,
    draft_len: Annotated[
        int | None, typer.Option(help="Tokens drafted in a round; left out, planned anew after each.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes mode ids, above 0 coupled, topk and full.")] = 0.0,
    uplink_k: Annotated[int, typer.Option(help="Entries sent of each distribution in mode topk.")] = 32,
    json_file: JsonOption = None,
) -> None:
    """Tokens a second with drafting against the target alone, over loopback, both in one run."""
    from bench.prompts import read_prompts
    from bench.speedup import SpeedupSettings, measure_speedup, results
    from bench.station import running_station
    from bench.workplace import workplace

    chosen = read_prompts(prompts, count)
    settings = SpeedupSettings(max_new_tokens, draft_len, temperature, uplink_k)
    with running_station(target, dtype) as address, workplace(bundle, address) as place, _progress() as progress:
        task = progress.add_task("answers", total=len(chosen) * len(settings.cases()))
        rows = measure_speedup(place, chosen, settings, lambda: progress.advance(task))
        measured = results(place, rows, settings, dtype)
    measured.show(console)
    measured.write(json_file)


@app.command()
def exact(
    bundle: BundleOption,
    target: TargetOption,
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens for each.")] = 64,
    draft_lens: Annotated[list[int] | None, typer.Option("--draft-len", help="May be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes mode ids, above 0 coupled.")] = 0.0,
    json_file: JsonOption = None,
) -> None:
    """Hold answers, token for token, against transformers' own or the target alone, in float32."""
    from bench.exact import TargetAlone, Transformers, differences
    from bench.prompts import read_prompts
    from bench.results import Results
    from bench.station import running_station
    from bench.workplace import workplace

    chosen = read_prompts(prompts, count)
    lengths, sampling = draft_lens or [1, 4, 8], Sampling(temperature, seed=1)
    with running_station(target, "float32") as address, workplace(bundle, address) as place, _progress() as progress:
        task = progress.add_task("answers", total=len(chosen) * (1 + len(lengths)))
        reference = Transformers(target) if sampling.greedy else TargetAlone(place, sampling)
        found = differences(place, reference, chosen, max_new_tokens, sampling, lengths, lambda: progress.advance(task))
    rows = [
        {
            "case": f"draft_len {length}",
            "prompts": len(chosen),
            "differ": sum(one.draft_len == length for one in found),
            "differ_without_tie": sum(one.draft_len == length and not one.is_tie for one in found),
            "largest_gap": max((one.gap for one in found if one.draft_len == length and one.gap), default=None),
        }
        for length in lengths
    ]
    measured = Results(
        {"target": target, "dtype": "float32", "temperature": temperature, "max_new_tokens": max_new_tokens}, rows
    )
    measured.show(console)
    measured.write(json_file)
    if any(not one.is_tie for one in found) or len({one.prompt for one in found}) * 40 > len(chosen):
        raise typer.Exit(1)


@app.command()
def encodings(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds of 8 tokens for each.")] = 2,
    uplink_k: Annotated[int, typer.Option(help="Entries kept of each distribution.")] = 32,
    json_file: JsonOption = None,
) -> None:
    """Bytes of a drafted token against what its rounding costs in acceptance, for each encoding."""
    from basestation.target_model import TargetModel
    from bench.encodings import collect, measure, results
    from bench.prompts import read_prompts
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    chosen = read_prompts(prompts, count)
    model, judge = DraftModel(bundle), TargetModel.load(target, dtype)
    tokenizer = Tokenizer(bundle, model.manifest)
    prompt_ids = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in chosen]
    with _progress() as progress:
        task = progress.add_task("prompts", total=len(chosen))
        corpus = collect(model, judge, prompt_ids, rounds, lambda: progress.advance(task))
    measured = results(measure(corpus, uplink_k), corpus, model.manifest.name, judge.name)
    measured.show(console)
    measured.write(json_file)


@app.command()
def overheads(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    sessions: Annotated[int, typer.Option(help="In one pass of the target, each with a prompt.")] = 16,
    tokens: Annotated[int, typer.Option(help="Drafted for each.")] = 40,
    json_file: JsonOption = None,
) -> None:
    """What the noise of mode coupled and the encoding of drafts cost, against drafting and a pass."""
    from basestation.target_model import TargetModel
    from bench.overheads import device_rows, station_rows
    from bench.prompts import read_prompts
    from bench.results import Results
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    chosen = read_prompts(prompts, sessions)
    model = DraftModel(bundle)
    tokenizer = Tokenizer(bundle, model.manifest)
    prompt_ids = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in chosen]
    with _progress() as progress:
        task = progress.add_task("prompts", total=len(chosen))
        rows, texts = device_rows(model, prompt_ids, tokens, lambda: progress.advance(task))
    rows += station_rows(TargetModel.load(target, dtype), texts)
    measured = Results({"draft": model.manifest.name, "target": target, "dtype": dtype, "sessions": sessions}, rows)
    measured.show(console)
    measured.write(json_file)


@app.command()
def theory(json_file: JsonOption = None) -> None:
    """The paper's tables recomputed, its closed form against brute force, and simulated rounds."""
    from bench import theory as paper
    from bench.results import Results

    with _progress() as progress:
        task = progress.add_task("values of alpha", total=len(paper.FINE_ALPHAS))
        found = paper.disagreements(lambda: progress.advance(task))
    tables = [*paper.draft_len_rows(), *paper.cost_rows(), *paper.round_trip_rows()]
    shown = Results({}, [*tables, paper.grid_row(found), *paper.simulated_rows()])
    shown.show(console)
    Results({}, [*shown.rows, *paper.map_rows()]).write(json_file)
    if any(not one.is_tie for one in found):
        raise typer.Exit(1)


@app.command()
def relay(
    server: Annotated[str, typer.Option(help="The base station, as tcp://HOST:PORT.")],
    up_mbit: RateOption = math.inf,
    up_delay_ms: DelayOption = 0.0,
    up_jitter_ms: JitterOption = 0.0,
    up_outages: Annotated[list[str] | None, typer.Option("--up-outage", help=OUTAGE)] = None,
    down_mbit: RateOption = math.inf,
    down_delay_ms: DelayOption = 0.0,
    down_jitter_ms: JitterOption = 0.0,
    down_outages: Annotated[list[str] | None, typer.Option("--down-outage", help=OUTAGE)] = None,
) -> None:
    """A slow link to a base station, on loopback: connect devices to the address it prints. Ctrl-C ends it."""
    from bench.link import Relay, Way, endpoint, parse_outages

    up = Way(1e6 * up_mbit, up_delay_ms / 1e3, up_jitter_ms / 1e3, parse_outages(up_outages or []))
    down = Way(1e6 * down_mbit, down_delay_ms / 1e3, down_jitter_ms / 1e3, parse_outages(down_outages or []))
    slow_link = Relay(*endpoint(server), up, down)
    typer.echo(f"relaying {server} at {slow_link.address}", err=True)
    slow_link.serve()


@app.command()
def link(json_file: JsonOption = None) -> None:
    """How well the relay keeps the rate and delay it is asked for, on this machine."""
    from bench.link_accuracy import cases, measure_accuracy
    from bench.results import Results

    with _progress() as progress:
        task = progress.add_task("cases", total=2 * len(cases()))
        rows = measure_accuracy(lambda: progress.advance(task))
    measured = Results({}, rows)
    measured.show(console)
    measured.write(json_file)


def main() -> None:
    """Run the command line."""
    run(app, "bench")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
