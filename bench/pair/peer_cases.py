"""The programs that ``peers`` compares, each with the reason why it cannot run, if there is one."""

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from basestation.target.int8_linear import int8_obstacle
from bench.grid.cells import Cell
from bench.link.relay import relay_command
from bench.pair.peer_process import PeerProcess, peer_process
from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.server_process import serving
from bench.setup.station_process import running_station
from device.drafting.load_model import load_model
from device.planning.planners import Planners
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import LinkError
from protocol.messages import Mode, Sampling

OWN = "edgedraft, loopback"
OWN_INT8 = "edgedraft int8, loopback"
LINK = Cell(0.0, round_trip_ms=50.0, uplink_mbit=50.0)
CONTEXT = 4096
"""Tokens for which llama.cpp keeps a KV cache."""
AUTODRAFT = "autodraft-sd 1.1.1 needs CUDA at both ends: without, 'Torch not compiled with CUDA enabled'"


@dataclass(frozen=True)
class PeerAnswer:
    """The ids that follow a prompt, and the bytes that crossed a link; None where there is no link."""

    token_ids: list[int]
    link_bytes: int | None = None


AnswerPrompt: TypeAlias = Callable[[list[int], int], PeerAnswer]
"""Takes the ids of a prompt and the number of new tokens."""


@dataclass(frozen=True)
class PeerCase:
    """A program and how it generates.

    Attributes:
        name: of the case.
        target_alone: the case whose answers are the target's own, in the same program and precision.
        answer: None where it cannot run.
        missing: why it cannot; None if it can.
    """

    name: str
    target_alone: str
    answer: AnswerPrompt | None
    missing: str | None


@dataclass(frozen=True)
class PairFiles:
    """The same pair in each program's format; None where the user has none.

    Attributes:
        bundle: the draft model on ONNX Runtime.
        target: for transformers and the base station.
        dtype: of the target.
        draft: the model that the bundle was converted from.
        small_draft: a model with another tokenizer.
        target_gguf: for llama.cpp.
        draft_gguf: likewise.
        node_folder: where node-llama-cpp is installed.
        threads: of every program.
    """

    bundle: Path
    target: str
    dtype: str
    draft: str | None
    small_draft: str | None
    target_gguf: Path | None
    draft_gguf: Path | None
    node_folder: Path
    threads: int


def peer_cases(files: PairFiles, stack: ExitStack) -> list[PeerCase]:
    """Start every program that can run; ``stack`` ends them."""
    autodraft = [
        PeerCase(f"autodraft-sd, {link}", "autodraft-sd", None, AUTODRAFT) for link in ("loopback", "50 ms link")
    ]
    own = [*_own_cases(files, stack), *_int8_cases(files, stack)]
    return [*_transformers_cases(files, stack), *_llama_cpp_cases(files, stack), *autodraft, *own]


def _transformers_cases(files: PairFiles, stack: ExitStack) -> list[PeerCase]:
    names = {"target alone": "target alone", "draft": "assisted", "small draft": "assisted, other tokenizer"}
    missing = {
        "draft": None if files.draft else "needs --draft",
        "small draft": None if files.small_draft else "needs --small-draft",
    }
    arguments = [files.target, files.dtype, files.draft or "", files.small_draft or "", str(files.threads)]
    command = [sys.executable, "-m", "bench.pair.transformers_worker", *arguments]
    return _process_cases("transformers", command, None, names, missing, stack)


def _llama_cpp_cases(files: PairFiles, stack: ExitStack) -> list[PeerCase]:
    names = {"target alone": "target alone", "draft": "with draft"}
    if obstacle := llama_cpp_obstacle(files):
        missing: dict[str, str | None] = dict.fromkeys(names, obstacle)
        return _process_cases("llama.cpp", [], None, names, missing, stack)
    models = [str(path.resolve()) if path else "" for path in (files.target_gguf, files.draft_gguf)]
    shutil.copy(Path(__file__).with_name("llama_cpp.mjs"), files.node_folder)  # Node looks for packages beside the file
    command = ["node", "llama_cpp.mjs", *models, str(files.threads), str(CONTEXT)]
    missing = {"draft": None if files.draft_gguf else "needs --draft-gguf"}
    return _process_cases("llama.cpp", command, files.node_folder, names, missing, stack)


def llama_cpp_obstacle(files: PairFiles) -> str | None:
    """Why llama.cpp cannot run; None if it can."""
    if files.target_gguf is None:
        return "needs --target-gguf"
    if shutil.which("node") is None:
        return "needs node"
    if not (files.node_folder / "node_modules" / "node-llama-cpp").is_dir():
        return f"node-llama-cpp is not in {files.node_folder}: run make peers"
    return None


def _process_cases(
    program: str,
    command: list[str],
    folder: Path | None,
    names: Mapping[str, str],
    missing: Mapping[str, str | None],
    stack: ExitStack,
) -> list[PeerCase]:
    """The cases of one process, by the name that its requests have; an obstacle of each, if there is one."""
    process, failed = None, None
    if any(missing.get(case) is None for case in names):
        try:
            process = stack.enter_context(peer_process(program, command, folder))
        except LinkError as error:
            failed = str(error)
    found = []
    for case, name in names.items():
        obstacle = missing.get(case) or failed
        answer = _asking(process, case) if process and not obstacle else None
        found.append(PeerCase(f"{program}, {name}", f"{program}, target alone", answer, obstacle))
    return found


def _asking(process: PeerProcess, case: str) -> AnswerPrompt:
    return lambda prompt_ids, count: PeerAnswer(process.answer(case, prompt_ids, count))


def _own_cases(files: PairFiles, stack: ExitStack) -> list[PeerCase]:
    """This system with a planned draft length and without prompt lookup; over the link it also drafts ahead."""
    model = load_model(files.bundle, threads=files.threads)
    tokenizer = Tokenizer(files.bundle, model.manifest)
    station = stack.enter_context(running_station(files.target, files.dtype))
    relay = stack.enter_context(serving(relay_command(station, LINK.up, LINK.down))).address
    alone = DraftSettings(Mode.TARGET, Sampling(), 1, None)
    chosen = {
        "edgedraft, target alone": (station, alone),
        OWN: (station, DraftSettings(Mode.IDS, Sampling(), 1, None)),
        "edgedraft, 50 ms link": (relay, DraftSettings(Mode.IDS, Sampling(), 1, None, drafts_ahead=None)),
    }
    found = []
    for name, (address, settings) in chosen.items():
        setup = stack.enter_context(connected(model, tokenizer, address, Planners(model.manifest.target_quality)))
        found.append(PeerCase(name, "edgedraft, target alone", _own_answer(setup, settings), None))
    return found


def _int8_cases(files: PairFiles, stack: ExitStack) -> list[PeerCase]:
    """This system with int8 weights of the target, whose answers are those of these weights alone."""
    alone, drafting = DraftSettings(Mode.TARGET, Sampling(), 1, None), DraftSettings(Mode.IDS, Sampling(), 1, None)
    chosen = {"edgedraft int8, target alone": alone, OWN_INT8: drafting}
    if obstacle := int8_obstacle(torch.device("cpu")):
        return [PeerCase(name, "edgedraft int8, target alone", None, obstacle) for name in chosen]
    model = load_model(files.bundle, threads=files.threads)
    tokenizer = Tokenizer(files.bundle, model.manifest)
    station = stack.enter_context(running_station(files.target, files.dtype, "--weights", "int8"))
    setup = stack.enter_context(connected(model, tokenizer, station, Planners(model.manifest.target_quality)))
    return [
        PeerCase(name, "edgedraft int8, target alone", _own_answer(setup, settings), None)
        for name, settings in chosen.items()
    ]


def _own_answer(setup: BenchSetup, settings: DraftSettings) -> AnswerPrompt:
    def answer(prompt_ids: list[int], count: int) -> PeerAnswer:
        found = setup.answer(prompt_ids, count, settings)
        return PeerAnswer(found.token_ids, found.uplink_bytes + found.downlink_bytes)

    return answer
