"""What planners learn outlives their process, and costs an answer nothing where it cannot be kept."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from device.planning.planner import Planner
from device.planning.planner_figures import PlannerFigures
from device.planning.planner_store import MAX_FILES, PlannerStore
from device.planning.planners import Planners
from device.planning.time_estimates import ASSUMED_COST, PREFILL_COST
from device.planning.trials import TRIAL
from device.settings import DraftSettings
from device.state_folder import state_folder
from protocol.messages import Decode, Draft, Mode, Sampling, Welcome
from tests.fakes import FakeDraftModel, FakeTarget, manifest, random_table
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.planner_start import ADDRESS, LINKS, SETTINGS, VOCAB, answer_seconds, measure, new_pair, store_in
from tests.sample import BUNDLE
from tests.timed_pair import PairTimes

WELCOME = Welcome(4, "table", 4096, 64, tuple(Mode), vocab_size=VOCAB)
FIGURES = PlannerFigures(0.03, 0.1, 0.001, 0.004, 0.002, 40.0, 0.9, {0: 0.5, 3: 0.98}, 32, False, 12, 640)


def written(folder: Path, settings: DraftSettings = SETTINGS, welcome: Welcome = WELCOME) -> Path:
    """The file of these settings, with ``FIGURES``."""
    before = set(folder.iterdir()) if folder.exists() else set()
    store_in(folder).write(settings, welcome, FIGURES)
    (path,) = set(folder.iterdir()) - before
    return path


def test_figures_are_read_as_they_were_written(tmp_path: Path) -> None:
    written(tmp_path / "planner")
    assert store_in(tmp_path / "planner").read(SETTINGS, WELCOME) == FIGURES


def altered(**values: object) -> str:
    return json.dumps(FIGURES.to_json() | values)


DAMAGED = [
    "",
    "{",
    "[]",
    "7",
    "null",
    "[" * 4000,
    "\x00\xff",
    altered()[:-9],
    altered() + " " * 4096,
    altered(format=0),
    altered(format=None),
    altered(target_seconds=float("nan")),
    altered(link_seconds=float("inf")),
    altered(link_seconds=-1.0),
    altered(token_seconds=[1.0]),
    altered(draft_seconds=3601),
    altered(tokens_per_second=1e7),
    altered(tokens_per_second=10**400),
    altered(acceptance=1.01),
    altered(acceptance=True),
    altered(acceptance_by_margin=[0.5]),
    altered(acceptance_by_margin={"0": 2}),
    altered(rounds=33),
    altered(alone=0),
    altered(since=10**10),
    altered(wait=None),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_ignored_and_replaced(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path)
    path.write_bytes(content.encode("latin-1"))
    with caplog.at_level("DEBUG", "device.planning.planner_store"):
        assert store_in(tmp_path).read(SETTINGS, WELCOME) is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    store_in(tmp_path).write(SETTINGS, WELCOME, FIGURES)
    assert store_in(tmp_path).read(SETTINGS, WELCOME) == FIGURES


def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert store_in(tmp_path).read(SETTINGS, WELCOME) is None


@pytest.mark.parametrize("blocked", ["state", "state/planner"])
def test_a_folder_that_cannot_be_made_is_no_error(
    blocked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file in place of the folder")
    store = store_in(tmp_path / "state" / "planner")
    with caplog.at_level("DEBUG", "device.planning.planner_store"):
        assert store.read(SETTINGS, WELCOME) is None
        store.write(SETTINGS, WELCOME, FIGURES)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


def test_a_user_without_a_home_has_no_folder_below_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert state_folder().is_absolute()


def test_the_oldest_files_beyond_the_bound_are_deleted(tmp_path: Path) -> None:
    for index in range(MAX_FILES + 6):
        path = written(tmp_path, welcome=replace(WELCOME, model=f"target {index}"))
        os.utime(path, (index, index))
    names = [f"target {index}" for index in range(MAX_FILES + 6)]
    kept = [name for name in names if store_in(tmp_path).read(SETTINGS, replace(WELCOME, model=name))]
    assert kept == names[6:]
    assert len(list(tmp_path.iterdir())) == MAX_FILES


def write_often(folder: Path, acceptance: float) -> None:
    for _ in range(300):
        store_in(folder).write(SETTINGS, WELCOME, replace(FIGURES, acceptance=acceptance))


def test_two_processes_write_and_a_third_reads_whole_files_alone(tmp_path: Path) -> None:
    path, context = written(tmp_path), get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path, acceptance)) for acceptance in (0.25, 0.75)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        figures = store_in(tmp_path).read(SETTINGS, WELCOME)
        assert figures
        assert figures.acceptance in (FIGURES.acceptance, 0.25, 0.75)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) == [path]


def test_other_settings_or_another_bundle_base_station_or_target_have_figures_of_their_own(tmp_path: Path) -> None:
    written(tmp_path)
    sampled = replace(SETTINGS, sampling=Sampling(1.5))
    others = [
        PlannerStore(tmp_path, manifest(VOCAB, context_length=512), ADDRESS).read(SETTINGS, WELCOME),
        store_in(tmp_path, "tcp://127.0.0.1:5756").read(SETTINGS, WELCOME),
        store_in(tmp_path).read(SETTINGS, replace(WELCOME, model="another target")),
        store_in(tmp_path).read(SETTINGS, replace(WELCOME, vocab_size=VOCAB + 1)),
        store_in(tmp_path).read(replace(SETTINGS, mode=Mode.TOPK), WELCOME),
        store_in(tmp_path).read(replace(SETTINGS, drafts_ahead=0), WELCOME),
        store_in(tmp_path).read(sampled, WELCOME),
        store_in(tmp_path).read(replace(SETTINGS, lookup=not SETTINGS.lookup), WELCOME),
        store_in(tmp_path).read(replace(SETTINGS, sampling=Sampling(0.0)), WELCOME),
    ]
    assert others == [None] * len(others)
    assert store_in(tmp_path).read(replace(SETTINGS, sampling=Sampling(0.9, seed=7)), WELCOME) == FIGURES


def test_a_base_station_that_restarts_with_another_context_length_keeps_its_figures(tmp_path: Path) -> None:
    written(tmp_path)
    assert store_in(tmp_path).read(SETTINGS, replace(WELCOME, context_length=1024)) == FIGURES


def test_block_verification_has_figures_of_its_own_where_distributions_are_sent(tmp_path: Path) -> None:
    block = replace(SETTINGS, block_verification=True)
    written(tmp_path)
    assert store_in(tmp_path).read(block, WELCOME) == FIGURES
    token_wise, block = (replace(settings, mode=Mode.TOPK) for settings in (SETTINGS, block))
    written(tmp_path, token_wise)
    assert store_in(tmp_path).read(block, WELCOME) is None
    planners = Planners(manifest(VOCAB).quality)
    assert planners.for_settings(token_wise, WELCOME) is not planners.for_settings(block, WELCOME)


def test_a_target_that_is_replaced_while_a_process_runs_gets_a_planner_of_its_own(tmp_path: Path) -> None:
    planners = Planners(manifest(VOCAB).quality, store=store_in(tmp_path))
    other = replace(WELCOME, model="another target")
    assert planners.for_settings(SETTINGS, WELCOME) is planners.for_settings(SETTINGS, WELCOME)
    assert planners.for_settings(SETTINGS, WELCOME) is not planners.for_settings(SETTINGS, other)


def test_a_fixed_draft_length_neither_reads_nor_writes_figures(tmp_path: Path) -> None:
    written(tmp_path)
    before = (next(tmp_path.iterdir())).read_bytes()
    pair = new_pair(LINKS["fast"])
    pair.restart_device(store_in(tmp_path))
    fixed = replace(SETTINGS, draft_len=4)
    list(pair.session(fixed, [3, 1, 4]).answer(20))
    pair.planners.keep(fixed, pair.client.welcome)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    assert pair.planners.for_settings(fixed, pair.client.welcome).alpha != FIGURES.acceptance


def requests(folder: Path | None) -> Iterator[Decode | Draft]:
    """The requests of an answer of a new process whose draft model always agrees with the target."""
    table = random_table(VOCAB, seed=1)
    station, model = Station(FakeTarget.make(table)), FakeDraftModel.make(table)
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    planners = Planners(model.manifest.quality, store=store_in(folder) if folder else None)
    list(open_session(client, SETTINGS, model, [3, 1, 4], planners).answer(30))
    for frame in transport.uplink:
        message = station.codec.decode(frame)
        if isinstance(message, Decode | Draft):
            yield message


def test_a_planner_with_figures_of_an_earlier_process_drafts_at_once_and_not_briefly(tmp_path: Path) -> None:
    without = list(requests(None))
    assert isinstance(without[0], Decode)
    assert without[0].count == TRIAL
    written(tmp_path)
    first, *_ = requests(tmp_path)
    assert isinstance(first, Draft)
    assert len(first.token_ids) > 4


def test_the_known_throughput_counts_beside_the_prediction() -> None:
    throughputs = []
    for known in (20.0, 40.0):
        planner = Planner(manifest(VOCAB).quality, greedy=False)
        planner.start(0.0, 0.0, replace(FIGURES, tokens_per_second=known))
        throughputs.append(planner.tokens_per_second)
    slow, fast = throughputs
    assert fast - slow == pytest.approx(20.0 * 4 / (4 + 6), rel=1e-6)  # rounds known, and those of the prediction


def rounds_of(planner: Planner, accepted: int, count: int) -> None:
    """Rounds of 4 drafted tokens with the times of ``FIGURES``."""
    for _ in range(count):
        planner.observe([None] * 4, accepted, 0.016, 0.134, 0.150)


def test_a_few_bad_rounds_do_not_end_drafting_that_an_earlier_process_found_faster() -> None:
    planner = Planner(manifest(VOCAB).quality, greedy=False)
    planner.start(0.0, 0.0, FIGURES)
    planner.observe_opened(0.1)
    rounds_of(planner, accepted=1, count=4)
    assert planner.speedup < 1
    assert planner.decode_len() == 0
    rounds_of(planner, accepted=1, count=40)
    assert planner.decode_len() > 0


def test_the_target_goes_on_alone_until_drafting_is_faster() -> None:
    planner = Planner(manifest(VOCAB).quality, greedy=False)
    planner.start(0.0, 0.0, replace(FIGURES, tokens_per_second=20.0, acceptance=0.7, alone=True, since=64, wait=64))
    planner.observe_opened(0.1)
    assert planner.decode_len() == 0  # a trial
    rounds_of(planner, accepted=2, count=1)
    assert 0.5 < planner.speedup < 1
    assert planner.decode_len() > 0


def guessing_planner(known: PlannerFigures) -> Planner:
    planner = Planner(manifest(VOCAB).quality, greedy=True)
    planner.drafts_ahead, planner.guesses = 3, True
    planner.start(0.0, 0.0, known)
    planner.observe_opened(0.1)
    return planner


def test_with_guesses_drafting_goes_on_where_it_is_slightly_slower_but_is_not_taken_up_there() -> None:
    between = 0
    for acceptance in (percent / 100 for percent in range(50, 96, 2)):
        known = replace(FIGURES, acceptance=acceptance, tokens_per_second=1 / FIGURES.target_seconds)
        drafting, alone = (guessing_planner(replace(known, alone=is_alone)) for is_alone in (False, True))
        assert drafting.speedup == pytest.approx(alone.speedup)
        assert (drafting.decode_len() == 0) is (drafting.speedup >= 0.85)
        assert (alone.decode_len() == 0) is (alone.speedup >= 1)
        between += 0.85 <= alone.speedup < 1
    assert between


def test_with_guesses_the_cost_of_a_trial_of_drafting_includes_the_way_back() -> None:
    planner = guessing_planner(replace(FIGURES, acceptance=0.5, tokens_per_second=20.0, alone=True, since=64, wait=64))
    assert planner.decode_len() == 0  # the trial
    planner.observe([None] * 4, 0, 0.016, 0.134, 0.25)
    assert planner.figures is not None
    lost = (0.25 + planner.times.round_trip_seconds) / planner.times.target_seconds() - 1
    assert planner.figures.wait == pytest.approx(100 * lost / planner.speedup, rel=0.01)


def test_a_planner_that_decoded_alone_goes_on_and_keeps_the_schedule_of_trials() -> None:
    known = replace(FIGURES, draft_seconds=0.2, tokens_per_second=5.0, alone=True, since=50, wait=64)
    planner = Planner(manifest(VOCAB).quality, greedy=False)
    planner.start(0.0, 0.0, known)
    planner.observe_opened(0.1)
    assert planner.decode_len() == planner.decode_len(backlog=32) == 14, "a prompt does not shorten its turn"
    planner.observe_decoded(14, 0.13, 0.03 * 13)
    assert planner.decode_len() == planner.decode_len(backlog=32) == 0


def test_the_target_decodes_alone_for_as_long_as_the_draft_model_takes_to_run_the_prompt() -> None:
    """A first token takes a reply, each further one a forward pass: 0.13 s and 0.03 s."""
    planner = Planner(manifest(VOCAB).quality, greedy=False)
    planner.start(0.0, 0.0, FIGURES)
    planner.observe_opened(0.1)
    assert [planner.decode_len(backlog) for backlog in (31, 32, 95, 110, 500)] == [0, 1, 3, 4, 30]
    planner.observe_prefill(160, 160 * 0.004)
    assert planner.decode_len(500) > 50
    assert planner.figures is not None
    assert planner.figures.prefill_seconds == pytest.approx(0.004, rel=0.05)


def test_a_token_of_a_prompt_is_first_taken_to_cost_a_part_of_a_drafted_one() -> None:
    planner = Planner(manifest(VOCAB).quality, greedy=False)
    planner.start(0.03, 0.001)
    planner.observe_opened(0.0)
    assert planner.decode_len(500) == round(500 * PREFILL_COST * ASSUMED_COST)


def test_the_pace_of_the_welcome_replaces_the_trial_of_the_target_and_that_of_an_earlier_process() -> None:
    planner = Planner(manifest(VOCAB).quality, greedy=True)
    planner.start(0.02, 0.001)
    planner.observe_opened(0.05)
    assert planner.decode_len() == 0
    assert planner.times.seconds(0) == pytest.approx(0.07)
    assert planner.times.verify_seconds(8) == pytest.approx(0.028, rel=1e-3)
    planner.start(0.02, 0.001, FIGURES)
    planner.observe_opened(0.5)
    assert planner.times.target_seconds() == pytest.approx(0.02)
    assert planner.times.round_trip_seconds == pytest.approx(FIGURES.link_seconds)


@pytest.mark.parametrize("known", [None, FIGURES])
def test_a_planner_that_continues_an_open_session_measures_the_link_itself(known: PlannerFigures | None) -> None:
    planner = Planner(manifest(VOCAB).quality, greedy=True)
    planner.start(0.02, 0.001, known)
    planner.observe_decoded(8, None, 0.14)
    for _ in range(30):
        planner.observe([2.0] * 4, 4, 0.016, 0.074, 0.09)
    planner.observe_opened(0.001)
    assert planner.times.round_trip_seconds + planner.times.verify_seconds(4) == pytest.approx(0.074, rel=0.1)


@pytest.mark.parametrize("link", LINKS)
def test_a_first_answer_with_figures_is_nearly_as_fast_as_that_of_a_warmed_process(link: str, tmp_path: Path) -> None:
    starts = measure(LINKS[link], tmp_path, answers=8)
    if link == "fast":  # on a far link the target decodes alone until guesses tell the acceptance
        assert starts.nothing < starts.welcome
    assert min(starts.state, starts.both) > 0.93 * starts.warmed


@pytest.mark.parametrize("link", LINKS)
def test_the_first_answer_ever_is_hardly_slower_than_the_targets_alone(link: str) -> None:
    target_alone = replace(SETTINGS, mode=Mode.TARGET)
    for tokens in (32, 96):
        seconds = answer_seconds(new_pair(LINKS[link]), tokens)
        assert answer_seconds(new_pair(LINKS[link]), tokens, settings=target_alone) > 0.93 * seconds


@pytest.mark.parametrize(("learnt_on", "used_on"), [("fast", "far"), ("far", "fast")])
def test_figures_of_another_link_are_outweighed_after_ten_rounds(learnt_on: str, used_on: str, tmp_path: Path) -> None:
    one_at_a_time = replace(SETTINGS, drafts_ahead=0)

    def after_ten_rounds(pair_knows: PairTimes, settings: DraftSettings = SETTINGS) -> tuple[float, float]:
        """Tokens per second, and the estimated time of the reply to 4 tokens."""
        learning = new_pair(pair_knows)
        learning.restart_device(store_in(tmp_path))
        answer_seconds(learning, 600)
        learning.planners.keep(SETTINGS, learning.client.welcome)
        pair = new_pair(LINKS[used_on])
        pair.restart_device(store_in(tmp_path))
        session = pair.session(settings, [1, 5])
        times: list[float] = []
        reply = 0.0
        for _ in session.answer(300):
            times.append(pair.now)
            if session.counters.rounds == 10:
                known = pair.planners.for_settings(settings, pair.client.welcome).times
                reply = known.round_trip_seconds + known.verify_seconds(4)
        later = [time for time in times if time > sorted(set(times))[9]]
        return len(later) / (later[-1] - later[0]), reply

    assert after_ten_rounds(LINKS[learnt_on])[0] > 0.9 * after_ten_rounds(LINKS[used_on])[0]
    _, reply = after_ten_rounds(LINKS[learnt_on], one_at_a_time)
    _, expected = after_ten_rounds(LINKS[used_on], one_at_a_time)
    assert reply == pytest.approx(expected, rel=0.2)


@pytest.mark.model
def test_generate_keeps_figures_unless_it_is_told_not_to(station_address: str, tmp_path: Path) -> None:
    def generate(*options: str) -> list[Path]:
        command = [sys.executable, "-m", "device", "generate", "--bundle", str(BUNDLE), "--server", station_address]
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        options = ("--max-new-tokens", "24", *options, "Why is the sky blue?")
        subprocess.run([*command, *options], env=environment, check=True, capture_output=True)
        return list(tmp_path.rglob("*"))

    assert generate("--no-state") == []
    assert [path.suffix for path in generate() if path.is_file()] == [".json"]
