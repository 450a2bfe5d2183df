"""``edgedraft-bench``: every figure of the documentation comes from one of these commands."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from protocol.command_line import Verbose, run
from protocol.errors import SettingsError
from protocol.messages import Sampling

if TYPE_CHECKING:  # the libraries behind it load when a command needs them
    from bench.grid import Cell
    from bench.grid_run import GridSettings

app = typer.Typer(add_completion=False, help="Measure this system against its alternatives.", no_args_is_help=True)
console = Console(highlight=False)

BundleOption = Annotated[Path, typer.Option(help="Bundle of the draft model.")]
TargetOption = Annotated[str, typer.Option(help="The target: model folder, hub name or .gguf file.")]
PromptsOption = Annotated[Path | None, typer.Option(help="Spec-Bench jsonl file; left out, the project's own prompts.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
RateOption = Annotated[float, typer.Option(help="Mbit/s.")]
DelayOption = Annotated[float, typer.Option(help="Milliseconds, one way.")]
JitterOption = Annotated[float, typer.Option(help="Up to so many milliseconds more, at random.")]
GRID = "A grid of links"
OUTAGE = "START:SECONDS, from the relay's start; may be repeated."
DtypeOption = Annotated[str, typer.Option(help="Of the target: auto, float32 or bfloat16.")]
TorchDeviceOption = Annotated[str, typer.Option(help="Of the target: auto, cpu, cuda …")]


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
    count: Annotated[
        int | None, typer.Option(help="How many prompts; 8, in a grid 3, and above temperature 0 10.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens for each; 128, in a grid 64, and above temperature 0 32.")
    ] = None,
    draft_len: Annotated[
        int | None, typer.Option(help="Tokens drafted in a round; left out, planned anew after each.")
    ] = None,
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="0 takes mode ids, above 0 coupled, topk, full; a grid takes several."),
    ] = None,
    uplink_k: Annotated[int, typer.Option(help="Entries sent of each distribution in mode topk.")] = 32,
    grid: Annotated[bool, typer.Option("--grid", help="Measure over a grid of links.", rich_help_panel=GRID)] = False,
    round_trips: Annotated[
        list[float] | None, typer.Option("--round-trip-ms", help="0, 10, 20, 50 and 100.", rich_help_panel=GRID)
    ] = None,
    uplinks: Annotated[
        list[float] | None, typer.Option("--uplink-mbit", help="1, 5 and 50.", rich_help_panel=GRID)
    ] = None,
    answer_seconds: Annotated[
        float | None,
        typer.Option(
            help="For each answer at most, but two rounds; 3, and above temperature 0 2.", rich_help_panel=GRID
        ),
    ] = None,
    repeat_busy: Annotated[
        bool,
        typer.Option("--repeat-busy", help="Measure cells again that shared the machine.", rich_help_panel=GRID),
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Tokens a second with drafting against the target alone, both in one run: over loopback, or a grid of links.

    A grid is written to the JSON file cell by cell; the same command goes on where the file ends.
    """
    from bench.prompts import read_prompts

    if grid or round_trips or uplinks:
        from bench.grid import ROUND_TRIPS_MS, TEMPERATURES, UPLINKS_MBIT, Answers, cells
        from bench.grid_run import GridSettings
        from bench.pace import Length

        greedy, sampled = (
            Answers(read_prompts(prompts, count or many), Length(max_new_tokens or tokens, answer_seconds or seconds))
            for many, tokens, seconds in ((3, 64, 3.0), (10, 32, 2.0))
        )
        wanted = cells(temperatures or TEMPERATURES, round_trips or ROUND_TRIPS_MS, uplinks or UPLINKS_MBIT)
        _measure_grid(bundle, GridSettings(target, dtype, greedy, sampled), wanted, json_file, repeat_busy)
        return
    from bench.speedup import SpeedupSettings, measure_speedup, results
    from bench.station import running_station
    from bench.workplace import workplace

    if temperatures and len(temperatures) > 1:
        raise SettingsError("temperature", temperatures, "one, or several together with --grid")
    chosen = read_prompts(prompts, count or 8)
    settings = SpeedupSettings(max_new_tokens or 128, draft_len, temperatures[0] if temperatures else 0.0, uplink_k)
    with running_station(target, dtype) as address, workplace(bundle, address) as place, _progress() as progress:
        task = progress.add_task("answers", total=len(chosen) * len(settings.cases()))
        rows = measure_speedup(place, chosen, settings, lambda: progress.advance(task))
        measured = results(place, rows, settings, dtype)
    measured.show(console)
    measured.write(json_file)


def _measure_grid(
    bundle: Path, settings: "GridSettings", wanted: list["Cell"], json_file: Path | None, repeat_busy: bool
) -> None:
    from bench.cell_file import CellFile
    from bench.grid import Cell, cases
    from bench.grid_run import GridRun
    from bench.grid_summary import shown
    from bench.results import Results

    with _progress() as progress, GridRun(bundle, settings, lambda: progress.advance(task)) as run:
        kept = CellFile(json_file, run.described())
        missing = [cell for cell in wanted if not kept.is_done(cell, repeat_busy)]
        answers = sum(len(settings.answers(cell).prompts) * len(cases(cell)) for cell in missing)
        task = progress.add_task("answers", total=answers)
        for cell in missing:
            loopback = kept.rows_of(Cell(cell.temperature)) if cell.round_trip_ms is not None else []
            kept.add(cell, run.cell_rows(cell, loopback))
        for cell in wanted:  # predictions follow the loopback cell, which may be younger
            if rows := kept.rows_of(cell):
                run.compare(rows, cell, kept.rows_of(Cell(cell.temperature)))
                kept.add(cell, rows)
    Results({}, shown([row for cell in wanted for row in kept.rows_of(cell)])).show(console)


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
    from bench.encodings import SAMPLING, measure, results
    from bench.positions import collect
    from bench.prompts import read_prompts
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    chosen = read_prompts(prompts, count)
    model, judge = DraftModel(bundle), TargetModel.load(target, dtype)
    tokenizer = Tokenizer(bundle, model.manifest)
    prompt_ids = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in chosen]
    with _progress() as progress:
        task = progress.add_task("prompts", total=len(chosen))
        corpus = collect(model, judge, prompt_ids, rounds, SAMPLING, lambda: progress.advance(task))
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
def prefixes(
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[int, typer.Option(help="In one pass.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 350,
    shared: Annotated[int, typer.Option(help="Of these, the tokens that all begin with.")] = 256,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 4,
    json_file: JsonOption = None,
) -> None:
    """What a beginning that sessions have in common costs in a pass, and what it saves."""
    from basestation.target_model import TargetModel
    from bench.prefixes import measure_prefixes
    from bench.results import Results

    judge = TargetModel.load(target, dtype, torch_device)
    with _progress() as progress:
        task = progress.add_task("measurements", total=None)
        rows = measure_prefixes(judge, sessions, context, shared, draft_len + 1, lambda: progress.advance(task))
    measured = Results({"target": judge.name, "dtype": dtype, "context": context, "draft_len": draft_len}, rows)
    measured.show(console)
    measured.write(json_file)


@app.command()
def uplink(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds of 8 tokens for each.")] = 2,
    uplink_ks: Annotated[
        list[int] | None, typer.Option("--uplink-k", help="May be repeated; 1, 3, 8, 32, 128, 320, 3200 and all.")
    ] = None,
    temperatures: Annotated[
        list[float] | None, typer.Option("--temperature", help="May be repeated; 0, 0.7 and 1.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Bytes of a drafted token and how likely it stands, for each mode and K, at several temperatures."""
    from basestation.target_model import TargetModel
    from bench.positions import collect
    from bench.prompts import read_prompts
    from bench.results import Results
    from bench.uplink import TEMPERATURES, UPLINK_K, check_uplink_k, uplink_rows
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    chosen = read_prompts(prompts, count)
    model = DraftModel(bundle)
    vocab_size = model.manifest.vocab_size
    kept = check_uplink_k(uplink_ks or [*UPLINK_K, vocab_size], vocab_size)
    samplings = [Sampling(temperature, seed=1) for temperature in temperatures or TEMPERATURES]
    judge, tokenizer = TargetModel.load(target, dtype), Tokenizer(bundle, model.manifest)
    prompt_ids = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in chosen]
    measured = Results(
        {"draft": model.manifest.name, "target": judge.name, "dtype": dtype, "vocab_size": vocab_size}, []
    )
    with _progress() as progress:
        task = progress.add_task("prompts", total=len(chosen) * len(samplings))
        for sampling in samplings:
            corpus = collect(model, judge, prompt_ids, rounds, sampling, lambda: progress.advance(task))
            measured = Results(measured.settings, [*measured.rows, *uplink_rows(corpus, kept)])
            measured.write(json_file)
    measured.show(console)


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
def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files that the commands wrote.")] = (
        Path("docs/results")
    ),
    docs: Annotated[Path, typer.Option(help="Folder to write results.md and plots/ into.")] = Path("docs"),
) -> None:
    """Write docs/results.md and its plots from result files alone."""
    from bench.report import write_report

    console.print(f"wrote {write_report(results, docs)}")


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


@app.command()
def capacity(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[int, typer.Option(help="Devices at once.")] = 16,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 100,
    longest: Annotated[int, typer.Option(help="Tokens of the longest.")] = 600,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 8,
    answer_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 48,
    think: Annotated[
        float | None, typer.Option(help="Milliseconds a device drafts a token; left out, as recorded.")
    ] = None,
    delay: Annotated[float, typer.Option(help="Milliseconds one way over the link.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Of each turn of a case.")] = 5.0,
    turns: Annotated[int, typer.Option(help="Of each case.")] = 3,
    recording: Annotated[
        Path | None, typer.Option(help="File of recorded rounds: read where it exists, written where not.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """What one base station serves: replayed devices, the target alone, and a pass against a dense batch."""
    import torch

    from basestation.target_model import TargetModel
    from bench.capacity import CapacitySettings, measure_pass_rows, measure_replay, ratios, recorded
    from bench.passes import load_dense
    from bench.replay import Pace
    from bench.results import Results, Value
    from bench.station import station_process
    from device.draft_model import DraftModel
    from device.tokenizer import Tokenizer

    pace = Pace(None if think is None else think / 1e3, delay / 1e3)
    settings = CapacitySettings(sessions, (shortest, longest), draft_len, answer_len, seconds, turns=turns, pace=pace)
    model, judge = DraftModel(bundle), TargetModel.load(target, dtype, torch_device)
    manifest, name = model.manifest, judge.name
    with _progress() as progress:
        task = progress.add_task("measurements", total=None)
        dense = load_dense(target, dtype, judge.torch_device)
        rows = measure_pass_rows(judge, dense, settings, lambda: progress.advance(task))
        tokenizer = Tokenizer(bundle, manifest)
        recordings = recorded(recording, model, judge, tokenizer, settings, lambda: progress.advance(task))
        del dense, judge, model
        torch.cuda.empty_cache()
        with station_process(target, dtype, ["--torch-device", torch_device]) as station:
            rows += measure_replay(station, recordings, manifest, settings, lambda: progress.advance(task))
    facts: dict[str, Value] = {
        "target": name,
        "dtype": dtype,
        "draft_len": draft_len,
        "contexts": f"{shortest} to {longest}",
        "token_milliseconds": 1e3 * recordings[0].token_seconds if think is None else think,
        "delay_milliseconds": delay,
        "seconds": seconds,
        "turns": turns,
    }
    compared = ratios(rows, sessions)
    Results(facts, rows).show(console)
    Results(facts, compared).show(console)
    Results(facts, [*rows, *compared]).write(json_file)


@app.command()
def ceiling(
    shape: Annotated[str, typer.Option(help="Of the target: 7b or 135m.")] = "7b",
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[
        list[int] | None, typer.Option(help="In one pass; may be repeated; 1, 4, 16, 64 and 256.")
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--context", help="Tokens of each; may be repeated; 512 and 2048.")
    ] = None,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Passes of a large target with random weights against a dense batch, and against no drafts: meant for CUDA."""
    from basestation.target_model import choose_dtype, choose_placement
    from bench.ceiling import CASES, SHAPES, Ceiling, card, combinations, compare
    from bench.results import Results, Row, Value

    if shape not in SHAPES:
        raise SettingsError("shape", shape, " or ".join(SHAPES))
    wanted = combinations(contexts or (512, 2048), sessions or (1, 4, 16, 64, 256), draft_len)
    placement = choose_placement(torch_device)
    facts: dict[str, Value] = {"card": card(placement), "shape": shape, "dtype": dtype, "draft_len": draft_len}
    measured = Ceiling(SHAPES[shape], choose_dtype(dtype, placement), placement)
    rows: list[Row] = []
    with _progress() as progress:
        task = progress.add_task("cases", total=len(wanted) * len(CASES))
        for combination in wanted:
            rows += measured.rows(combination, lambda: progress.advance(task))
            Results(facts, [*rows, *compare(rows)]).write(json_file)
    Results(facts, [*rows, *compare(rows)]).show(console)


@app.command()
def churn(
    bundle: BundleOption,
    target: TargetOption,
    recording: Annotated[Path, typer.Option(help="Rounds that edgedraft-bench capacity --recording wrote.")],
    dtype: DtypeOption = "bfloat16",
    sessions: Annotated[int, typer.Option(help="In all.")] = 1000,
    seconds: Annotated[float, typer.Option(help="In which they come.")] = 600.0,
    at_once: Annotated[int, typer.Option(help="At the same time.")] = 32,
    keep_seconds: Annotated[int, typer.Option(help="How long the station keeps one whose device is gone.")] = 30,
    kv_memory: Annotated[str, typer.Option(help="Of the station, for keys and values.")] = "512MiB",
    json_file: JsonOption = None,
) -> None:
    """A base station's memory while devices come, go and vanish."""
    from bench.churn import ChurnSettings, measure_churn
    from bench.replay import read_recordings
    from bench.results import Results
    from bench.station import station_process
    from device.draft_model import DraftModel

    recordings, manifest = read_recordings(recording), DraftModel(bundle).manifest
    settings = ChurnSettings(sessions, seconds, at_once)
    options = ["--keep-seconds", str(keep_seconds), "--kv-memory", kv_memory]
    with _progress() as progress, station_process(target, dtype, options) as station:
        task = progress.add_task("churn", total=10)
        rows = measure_churn(station, recordings, manifest, settings, lambda: progress.advance(task))
    measured = Results({"target": target, "dtype": dtype, "at_once": at_once, "kv_memory": kv_memory}, rows)
    measured.show(console)
    measured.write(json_file)


def main() -> None:
    """Run the command line."""
    run(app, "bench")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
