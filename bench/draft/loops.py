"""Greedy decoding with edgedraft's drafter and with other libraries' own loops, each on the CPU.

A library is imported when its loop is made. All but llama-cpp-python run the bundle's graph.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from time import perf_counter, process_time
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnxruntime

from bench.draft.models import Models
from device.drafting.drafter import Drafter
from device.drafting.load_model import load_model
from device.settings import UplinkSettings
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling

DRAFT_LEN = 8
_CONTEXT = 2048
"""Tokens for which llama.cpp keeps a KV cache."""


@dataclass(frozen=True)
class Decoded:
    """Tokens that follow a prompt.

    Attributes:
        token_ids: the first token, which the prompt's forward pass gives, and those decoded one by one.
        seconds: from the first token to the last.
        cpu_seconds: of all threads in this time.
        engine_seconds: of these within ONNX Runtime; None where a library hides its calls.
    """

    token_ids: list[int]
    seconds: float
    cpu_seconds: float
    engine_seconds: float | None = None


class Clock:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._began = perf_counter(), process_time()

    def times(self) -> tuple[float, float]:
        """Seconds, and CPU seconds of all threads."""
        return perf_counter() - self._began[0], process_time() - self._began[1]


class Loop(Protocol):
    """A library that decodes greedily."""

    def decode(self, prompt_ids: list[int], count: int) -> Decoded:
        """The first token after a prompt and ``count`` more; ends at no stop id."""


class EdgedraftLoop:
    """The drafter in mode ``ids``: Drafts of ``DRAFT_LEN`` tokens, encoded, and all accepted."""

    def __init__(self, models: Models, threads: int) -> None:
        model = load_model(models.bundle, threads)
        uplink = UplinkSettings.of_mode(Mode.IDS, 1, 1.0, 0)
        self._drafter = Drafter(model, Mode.IDS, Sampling(), uplink, stop_ids=frozenset())
        self._codec = FrameCodec(model.manifest.vocab_size)

    def decode(self, prompt_ids: list[int], count: int) -> Decoded:
        """See ``Loop``."""
        tokens = list(prompt_ids)
        tokens += self._drafter.draft(tokens, 1).token_ids
        with engine_times() as engine_seconds:
            clock = Clock()
            while (missing := len(prompt_ids) + 1 + count - len(tokens)) > 0:
                drafted = self._drafter.draft(tokens, min(DRAFT_LEN, missing))
                self._codec.encode(Draft(0, 1, drafted.token_ids, drafted.distributions))
                tokens += drafted.token_ids
            times = clock.times()
        return Decoded(tokens[len(prompt_ids) :], *times, sum(engine_seconds))


class GenaiLoop:
    """onnxruntime-genai's generator."""

    def __init__(self, models: Models, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(models.folder))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._model = onnxruntime_genai.Model(config)

    def decode(self, prompt_ids: list[int], count: int) -> Decoded:
        """See ``Loop``."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt_ids) + 1 + count, do_sample=False)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array([prompt_ids], np.int32))
        generator.generate_next_token()
        token_ids = [int(generator.get_next_tokens()[0])]
        clock = Clock()
        for _ in range(count):
            generator.generate_next_token()
            token_ids.append(int(generator.get_next_tokens()[0]))
        return Decoded(token_ids, *clock.times())


class OptimumLoop:
    """``generate`` of transformers on optimum's ONNX Runtime model."""

    def __init__(self, models: Models, threads: int) -> None:
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model: Any = ORTModelForCausalLM.from_pretrained(models.folder, session_options=options)

    def decode(self, prompt_ids: list[int], count: int) -> Decoded:
        """See ``Loop``."""
        import torch

        row, streamer = torch.tensor([prompt_ids]), _Streamer()
        self._model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=count + 1,
            eos_token_id=None,
            streamer=streamer,
        )
        return Decoded(streamer.token_ids[len(prompt_ids) :], *streamer.times)


class LlamaCppLoop:
    """llama.cpp by its Python bindings, with the weights of a .gguf file."""

    def __init__(self, models: Models, threads: int) -> None:
        llama_cpp: Any = import_module("llama_cpp")
        self._model = llama_cpp.Llama(models.target, n_ctx=_CONTEXT, n_threads=threads, n_threads_batch=threads)

    def decode(self, prompt_ids: list[int], count: int) -> Decoded:
        """See ``Loop``."""
        tokens = self._model.generate(prompt_ids, top_k=1, temp=0.0)
        token_ids = [next(tokens)]
        clock = Clock()
        token_ids += islice(tokens, count)
        return Decoded(token_ids, *clock.times())


class _Streamer:
    """A streamer of transformers, which gets the prompt and then each token; ``times`` is from the first token."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.times = 0.0, 0.0
        self._puts = 0

    def put(self, token_ids: Any) -> None:
        """The next tokens, a tensor."""
        self._puts += 1
        if self._puts == 2:
            self._clock = Clock()
        elif self._puts > 2:
            self.times = self._clock.times()
        self.token_ids += token_ids.flatten().tolist()

    def end(self) -> None:
        """Nothing is left to do."""


NewLoop: TypeAlias = Callable[[Models, int], Loop]
LOOPS: dict[str, tuple[str, NewLoop]] = {
    "edgedraft": ("onnxruntime", EdgedraftLoop),
    "onnxruntime-genai": ("onnxruntime_genai", GenaiLoop),
    "optimum": ("optimum.onnxruntime", OptimumLoop),
    "llama-cpp-python": ("llama_cpp", LlamaCppLoop),
}
"""Each case's module and its loop, which takes the number of threads."""


def obstacle(case: str, target: str) -> str | None:
    """Why a case cannot run; None if it can."""
    module = LOOPS[case][0]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        return "not installed"
    if case == "llama-cpp-python" and not target.endswith(".gguf"):
        return "needs --target FILE.gguf"
    return None


@contextmanager
def engine_times() -> Iterator[list[float]]:
    """The seconds of each call of ONNX Runtime's Python interface within the block."""
    times: list[float] = []

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def run_timed(*arguments: Any) -> Any:
            began = perf_counter()
            result = run(*arguments)
            times.append(perf_counter() - began)
            return result

        return run_timed

    session = onnxruntime.InferenceSession
    run, run_with_iobinding = session.run, session.run_with_iobinding
    session.run, session.run_with_iobinding = timed(run), timed(run_with_iobinding)
    try:
        yield times
    finally:
        session.run, session.run_with_iobinding = run, run_with_iobinding
