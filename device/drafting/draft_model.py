"""The draft model on ONNX Runtime: tokens in, logits of the last position out.

There are two kinds of KV cache. ``SharedCache`` binds past and present to one
preallocated buffer, so that a step copies nothing and a rollback lowers a length;
``GrowingCache`` passes the present of one step to the next, for graphs of any
architecture.

Knows arrays and ONNX Runtime; not what is sampled from the logits.
"""

import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime

from common.error_text import first_line
from device.drafting.cuda_provider import CUDA_PROVIDERS, check_bundle, check_cuda, check_nodes
from device.drafting.huge_pages import huge_pages
from protocol.bundle import MODEL_NAME, CacheKind, Manifest
from protocol.errors import BundleError, SettingsError

Logits: TypeAlias = npt.NDArray[np.float32]
Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]
_FIRST_CAPACITY = 512
_MAX_THREADS = 1024


class KeyValueCache(Protocol):
    """A KV cache; the first ``length`` positions are valid."""

    length: int

    def run(self, inputs: Arrays, count: int) -> Logits:
        """Run ``count`` more tokens; return the logits [V] of the last."""

    def rollback(self, length: int) -> None:
        """Shorten the cache to ``length`` positions."""

    def fork(self, length: int) -> Self:
        """Another cache with a copy of the first ``length`` positions."""


class SequenceModel(Protocol):
    """A draft model with the KV cache of one sequence, in the tokens of the session."""

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens in the cache."""

    @property
    def forked_length(self) -> int:
        """How many of them it was forked with."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def fork(self, length: int) -> Self:
        """The same model with a cache of its own, which starts with a copy of the first ``length`` positions."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Prepare for a prompt, which ``forward`` then runs."""

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Run one or more tokens after the cached ones; return the logits [vocab_size] after the last of them."""

    def rollback(self, length: int) -> None:
        """Shorten the cache to ``length`` positions."""

    def room(self, token_ids: Sequence[int]) -> int:
        """How many tokens fit the context after ``token_ids``."""


class DraftModel:
    """A loaded bundle, with the KV cache of one sequence.

    Args:
        bundle: the folder that ``edgedraft-export convert`` wrote.
        threads: of ONNX Runtime; 0 uses all cores that the process may run on.
        providers: execution providers of ONNX Runtime, in order of preference.

    Attributes:
        token_ids: the tokens in the cache.
        forked_length: how many of them it was forked with.

    Raises:
        BundleError: the folder is not a bundle, is damaged, or cannot be loaded.
        SettingsError: the number of threads, or a provider that this ONNX Runtime does not have or cannot use here.
    """

    def __init__(self, bundle: Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.manifest = Manifest.read(bundle)
        self.manifest.check_files(bundle)
        with huge_pages():
            session = _load(bundle / MODEL_NAME, threads, providers, self.manifest)
        _check_graph(session, self.manifest)
        self._takes_positions = "position_ids" in {entry.name for entry in session.get_inputs()}
        self._reserve_positions(_FIRST_CAPACITY)
        shared = self.manifest.cache_kind is CacheKind.SHARED
        self._cache: KeyValueCache = (SharedCache if shared else GrowingCache)(session, self.manifest)
        self.token_ids: list[int] = []
        self.forked_length = 0

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self._cache.length

    def fork(self, length: int) -> Self:
        """The same model with a cache of its own, which starts with a copy of the first ``length`` positions."""
        fork = copy(self)
        fork._cache = self._cache.fork(length)
        fork.token_ids = self.token_ids[:length]
        fork.forked_length = length
        return fork

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Nothing is to be prepared for a prompt."""

    def room(self, token_ids: Sequence[int]) -> int:
        """How many tokens fit the context after ``token_ids``."""
        return max(0, self.manifest.context_length - len(token_ids))

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Run one or more tokens after the cached ones.

        Tokens of the target that the graph does not have are run as its token 0.

        Returns:
            float32 [graph_tokens], the logits after the last of them.
        """
        start, end = self._cache.length, self._cache.length + len(token_ids)
        if end > self._positions.size:
            self._reserve_positions(2 * end)
        ids = np.array([token_ids], np.int64)
        ids[ids >= self.manifest.graph_tokens] = 0
        inputs: Arrays = {"input_ids": ids, "attention_mask": self._ones[:, :end]}
        if self._takes_positions:
            inputs["position_ids"] = self._positions[:, start:end]
        logits = self._cache.run(inputs, len(token_ids))[: self.manifest.graph_tokens]
        self.token_ids += token_ids
        return logits

    def rollback(self, length: int) -> None:
        """Shorten the cache to ``length`` positions."""
        self._cache.rollback(min(length, self._cache.length))
        del self.token_ids[length:]

    def _reserve_positions(self, length: int) -> None:
        """Make the arrays whose views are the inputs of up to ``length`` positions."""
        self._ones = np.ones((1, length), np.int64)
        self._positions = np.arange(length, dtype=np.int64)[None]


class SharedCache:
    """Past and present share one buffer per layer: [1, kv_heads, capacity, head_size], where the attention runs.

    The logits, too, have a buffer, on the host: ``IOBinding.get_outputs`` would wrap the outputs of all layers. A run
    copies its inputs to the provider's device, and the logits back.
    """

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
        self.length = 0
        self._session = session
        self._shape = (1, manifest.kv_heads, 0, manifest.head_size)
        self._dtype = manifest.cache_dtype
        self._device = "cuda" if session.get_providers()[0] in CUDA_PROVIDERS else "cpu"
        self._vocab_size = int(_shapes(session)["logits"][-1])
        self._pasts = sorted(_past_names(session))
        self._buffers: dict[str, onnxruntime.OrtValue] = {}
        self._capacity = 0
        self._context_length = manifest.context_length
        self._binding = session.io_binding()

    def run(self, inputs: Arrays, count: int) -> Logits:
        """Run ``count`` more tokens; return the logits [V] of the last."""
        self._reserve(self.length + count)
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)
        self.length += count
        return self._logits.copy()

    def rollback(self, length: int) -> None:
        """Shorten the cache to ``length`` positions."""
        self.length = length

    def fork(self, length: int) -> Self:
        """Another cache with a copy of the first ``length`` positions."""
        fork = copy(self)
        fork.length = length
        fork._capacity = 0
        fork._buffers = dict(self._buffers) if length else {}
        fork._reserve(length)
        return fork

    def _reserve(self, length: int) -> None:
        """Grow to ``length`` positions; the capacity at least doubles, so that the copies cost little."""
        if length <= self._capacity:
            return
        self._capacity = max(length, min(max(2 * self._capacity, _FIRST_CAPACITY), self._context_length))
        binding = self._session.io_binding()
        logits = np.empty((1, 1, self._vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        for name in self._pasts:
            grown = np.zeros((*self._shape[:2], self._capacity, self._shape[3]), self._dtype)
            if name in self._buffers:
                grown[:, :, : self.length] = self._buffers[name].numpy()[:, :, : self.length]
            value = onnxruntime.OrtValue.ortvalue_from_numpy(grown, self._device)
            self._buffers[name] = value
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(_present_name(name), value)
        self._binding = binding
        self._logits: Logits = logits[0, 0]


class GrowingCache:
    """The present of one step is the past of the next: [1, kv_heads, length, head_size] per layer."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
        self.length = 0
        self._session = session
        empty = np.zeros((1, manifest.kv_heads, 0, manifest.head_size), manifest.cache_dtype)
        self._past: Arrays = dict.fromkeys(_past_names(session), empty)
        self._outputs = ["logits", *map(_present_name, self._past)]

    def run(self, inputs: Arrays, count: int) -> Logits:
        """Run ``count`` more tokens; return the logits [V] of the last."""
        logits, *present = self._session.run(self._outputs, {**inputs, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        self.length += count
        last: Logits = logits[0, -1]
        return last

    def rollback(self, length: int) -> None:
        """Shorten the cache to ``length`` positions."""
        self._past = {name: array[:, :, :length] for name, array in self._past.items()}
        self.length = length

    def fork(self, length: int) -> Self:
        """Another cache with the first ``length`` positions; a run writes into new arrays, so none is copied."""
        fork = copy(self)
        fork.rollback(length)
        return fork


def _shapes(session: onnxruntime.InferenceSession) -> dict[str, list[Any]]:
    return {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}


def _past_names(session: onnxruntime.InferenceSession) -> list[str]:
    return [entry.name for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]


def _present_name(past_name: str) -> str:
    return past_name.replace("past_key_values", "present")


def _check_graph(session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    """Check the shapes of a graph against the manifest; dimensions without a number agree with everything.

    Raises:
        BundleError: they contradict each other.
    """
    shapes = _shapes(session)
    if missing := {"input_ids", "attention_mask", "logits"} - set(shapes):
        raise BundleError(f"the graph has no {', '.join(sorted(missing))}; export the bundle again")
    for name in _past_names(session):
        for said, found in zip(("kv_heads", "head_size"), shapes[name][1::2], strict=False):
            listed = getattr(manifest, said)
            if isinstance(found, int) and found != listed:
                raise BundleError(f"the graph has {said} {found}; the manifest says {listed}: export the bundle again")
    *_, count, rows = shapes["logits"]
    if manifest.cache_kind is CacheKind.SHARED and (count != 1 or not isinstance(rows, int)):
        raise BundleError(
            f"the graph has logits of shape {shapes['logits']}, not of one token: export the bundle again"
        )
    if isinstance(rows, int) and rows < manifest.graph_tokens:
        raise BundleError(
            f"the graph has {rows} logits; the manifest says {manifest.graph_tokens} tokens: export the bundle again"
        )


def _load(path: Path, threads: int, providers: Sequence[str], manifest: Manifest) -> onnxruntime.InferenceSession:
    available = onnxruntime.get_available_providers()
    unknown = [name for name in providers if name not in available]
    if unknown:
        raise SettingsError("provider", unknown[0], ", ".join(available))
    on_gpu = [name for name in providers if name in CUDA_PROVIDERS]
    for name in on_gpu:
        check_cuda(name)
        check_bundle(name, manifest)
    if not 0 <= threads <= _MAX_THREADS:
        raise SettingsError("threads", threads, f"0 (all usable cores) to {_MAX_THREADS}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    # Spinning between the operators of a run saves a quarter of it; longer spinning only takes the cores from others.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    if on_gpu:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors share no base class
        reason = first_line(error)
        raise BundleError(f"{str(path)!r} cannot be loaded: {reason}; export the bundle again") from error
    started = session.get_providers()
    if idle := [name for name in providers if name not in started]:
        raise SettingsError("provider", idle[0], f"{', '.join(started)}, because ONNX Runtime could not start it")
    for name in on_gpu:
        check_nodes(name, session)
    return session
