"""The draft model on one core and a base station on another, which answer prompts in one case after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from bench.grid.cells import TARGET, AnswerLimits, Case, Cell, Workload
from bench.grid.recording_planner import RecordingPlanners
from bench.grid.throughput import Throughput, measure_throughput
from bench.link.relay import relay_command
from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.cores import Cores, running_on
from bench.setup.results import Row
from bench.setup.server_process import Served, serving
from bench.setup.station_process import station_command
from device.drafting.load_model import load_model
from device.drafting.no_draft_model import NoDraftModel
from device.settings import DEFAULT_UPLINK_K, DraftSettings, Timeouts
from device.text.tokenizer import Tokenizer
from protocol.errors import EdgedraftError
from protocol.messages import Sampling

WARM_UP = AnswerLimits(24, 4.0)
_RETRY_SECONDS = 20.0
Setups: TypeAlias = Mapping[tuple[bool, bool], BenchSetup]
"""By whether the draft model runs on the base station's core, and whether there is one."""


@dataclass(frozen=True)
class Measured:
    """The answers of each case, in the order of the prompts, and why the failed cases failed."""

    answers: Mapping[str, list[Throughput]]
    failures: Mapping[str, str]


class PairRun:
    """A loaded draft model, and a base station that is restarted if it dies.

    Args:
        bundle: of the draft model.
        target: of the base station.
        dtype: of the target.
        weights: of the target's linear layers.

    Raises:
        SettingsError: the machine has only one core.
    """

    def __init__(self, bundle: Path, target: str, dtype: str, weights: str = "dtype") -> None:
        self.model = load_model(bundle, threads=1)
        self._cores = Cores.choose()
        self._tokenizer = Tokenizer(bundle, self.model.manifest)
        self._target = target
        self._dtype = dtype
        self._weights = weights
        self._stack = ExitStack()
        self._station: Served | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def described(self) -> Row:
        """What all figures depend on."""
        manifest = self.model.manifest
        return {
            "target": Path(self._target).name,
            "target_dtype": self._dtype,
            "target_weights": self._weights,
            "draft": manifest.name,
            "draft_precision": manifest.precision,
            "cores": "one for the device, one for the base station",
        }

    def measure(self, cell: Cell, cases: Sequence[Case], workload: Workload, advance: Callable[[], object]) -> Measured:
        """Answer each prompt in each case; the cases take turns, in alternating order.

        Args:
            cell: the temperature and the link.
            cases: what is measured; those that fail are left out from then on.
            workload: the prompts, and when an answer ends.
            advance: called after each answer.
        """
        answers: dict[str, list[Throughput]] = {case.name: [] for case in cases}
        failures: dict[str, str] = {}
        with running_on(self._cores.device), ExitStack() as stack:
            try:
                station = self._running_station()
                setups = self._setups(stack, cell, cases, station.address)
                self._warm_up(setups, cell, cases, replace(workload, limits=WARM_UP))
                for index, prompt in enumerate(workload.prompts):
                    for case in cases[:: -1 if index % 2 else 1]:
                        if case.name not in failures and station.alive:
                            try:
                                answers[case.name].append(self._answer(setups, cell, case, prompt, workload))
                            except EdgedraftError as error:
                                failures[case.name] = str(error)
                        advance()
                if not station.alive:
                    failures = dict.fromkeys(answers, "the base station died")
            except EdgedraftError as error:
                failures = dict.fromkeys(answers, str(error))
        return Measured(answers, failures)

    def _setups(self, stack: ExitStack, cell: Cell, cases: Sequence[Case], station: str) -> Setups:
        """The device on its own core and, if cases need it, on the base station's core and without a draft model."""
        device = stack.enter_context(self._connected(stack.enter_context(self._linked(cell, station))))
        setups = {(False, True): device}
        if any(case.colocated for case in cases):
            with running_on(self._cores.station):
                setups[True, True] = stack.enter_context(self._connected(station))
        if not all(case.has_draft_model for case in cases):
            manifest = self.model.manifest
            planners = RecordingPlanners(manifest.target_quality)
            setups[False, False] = replace(device, model=NoDraftModel(manifest), planners=planners)
        return setups

    def _warm_up(self, setups: Setups, cell: Cell, cases: Sequence[Case], workload: Workload) -> None:
        """Run the first forward passes, which are slow, and let each planner measure its link."""
        planned = [case for case in cases if case is TARGET or case.draft_len is None]
        for case in planned or cases[:1]:
            self._answer(setups, cell, case, workload.prompts[0], workload)

    def _answer(self, setups: Setups, cell: Cell, case: Case, prompt: str, workload: Workload) -> Throughput:
        setup = setups[case.colocated, case.has_draft_model]
        with running_on(self._cores.station if case.colocated else self._cores.device):
            settings = _draft_settings(case, Sampling(cell.temperature, seed=workload.seed))
            return measure_throughput(setup, setup.prompt_ids(prompt), settings, workload.limits)

    def _running_station(self) -> Served:
        if self._station is None or not self._station.alive:
            command = station_command(self._target, self._dtype, "--weights", self._weights)
            self._station = self._stack.enter_context(serving(command, self._cores.station))
        return self._station

    @contextmanager
    def _linked(self, cell: Cell, address: str) -> Iterator[str]:
        """The address of the base station at the device's end of the cell's link."""
        if cell.round_trip_ms is None:
            yield address
            return
        with serving(relay_command(address, cell.up, cell.down), self._cores.device) as relay:
            yield relay.address

    @contextmanager
    def _connected(self, address: str) -> Iterator[BenchSetup]:
        planners = RecordingPlanners(self.model.manifest.target_quality)
        with connected(self.model, self._tokenizer, address, planners, Timeouts(retry=_RETRY_SECONDS)) as setup:
            yield setup


def _draft_settings(case: Case, sampling: Sampling) -> DraftSettings:
    return DraftSettings(
        case.mode,
        sampling,
        DEFAULT_UPLINK_K.get(case.mode, 1),
        case.draft_len,
        cache_last_token=not case.colocated,
        drafts_ahead=case.drafts_ahead,
        lookup=case.lookup,
        block_verification=case.block_verification,
    )
