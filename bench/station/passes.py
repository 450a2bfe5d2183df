"""Packed forward passes of the base station, dense batches of transformers with the same tokens, continuous batching.

A dense batch is padded where lengths differ.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache
from transformers.generation.continuous_batching import RequestStatus

from basestation.kv_cache.kv_pool import SequenceKVCache
from basestation.target.placement import DTYPES
from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel

_REPEATS = 15
_WARM_UP = 2
PREFILL_TOKENS = 4096
"""Tokens of all sessions in one step of a dense prefill, or in a pass of continuous batching."""
_BLOCK_SIZE = 32


@dataclass(frozen=True)
class PassTimes:
    """Median seconds of a forward pass of each kind."""

    packed: float
    dense: float


class DensePassRunner:
    """Runs a batch with a ``StaticCache``, padded on the left.

    Args:
        model: the target in transformers.
        sequences: the tokens of each sequence.
        new: tokens at the end of each that a pass runs; the others are prefilled here.
    """

    def __init__(self, model: Any, sequences: Sequence[list[int]], new: int) -> None:
        self._model = model
        longest = max(map(len, sequences))
        rows = torch.zeros((len(sequences), longest), dtype=torch.int64, device=model.device)
        self._mask = torch.zeros_like(rows)
        for row, tokens in enumerate(sequences):
            rows[row, longest - len(tokens) :] = torch.tensor(tokens)
            self._mask[row, longest - len(tokens) :] = 1
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        self._past = longest - new
        self._new_ids = rows[:, self._past :]
        self._cache = StaticCache(model.config, max_cache_len=longest)
        step = max(1, PREFILL_TOKENS // len(sequences))
        for start in range(0, self._past, step):
            end = min(start + step, self._past)
            self._run(rows[:, start:end], slice(start, end), logits_to_keep=1)

    def run(self) -> None:
        """Run the new tokens once; the next run overwrites them in the cache."""
        self._run(self._new_ids, slice(self._past, self._mask.shape[1]))

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor, columns: slice, logits_to_keep: int = 0) -> None:
        self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : columns.stop],
            position_ids=self._positions[:, columns],
            past_key_values=self._cache,
            cache_position=torch.arange(columns.start, columns.stop, device=ids.device),
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )


class PackedPassRunner:
    """Runs the same tokens as the base station does.

    Args:
        target: of the base station.
        sequences: the tokens of each sequence.
        new: tokens at the end of each that a pass runs; the others are prefilled here.
        shared: tokens of the prefix that all sequences share.
    """

    def __init__(self, target: TargetModel, sequences: Sequence[list[int]], new: int, shared: int = 0) -> None:
        self._target = target
        self._kv_caches: list[SequenceKVCache] = [target.new_kv_cache() for _ in sequences]
        pairs = list(zip(self._kv_caches, sequences, strict=True))
        self._segments = [Segment(kv_cache, tokens[-new:], new) for kv_cache, tokens in pairs]
        self._lengths = [len(tokens) - new for tokens in sequences]
        for kv_cache, tokens in pairs:
            if shared and kv_cache is not self._kv_caches[0]:
                kv_cache.share_prefix(self._kv_caches[0], shared)
            target.forward([Segment(kv_cache, tokens[kv_cache.length : -new], 0)])

    def run(self) -> torch.Tensor:
        """Run the new tokens once, roll the KV caches back, and return the logits."""
        logits = self._target.forward(self._segments)
        for kv_cache, length in zip(self._kv_caches, self._lengths, strict=True):
            kv_cache.rollback(length)
        return logits

    def release(self) -> None:
        """Free the KV caches."""
        for kv_cache in self._kv_caches:
            kv_cache.release()


class ContinuousBatchingError(Exception):
    """transformers' continuous batching failed."""


def continuous_batching_seconds(model: Any, sequences: Sequence[list[int]], passes: int) -> list[float]:
    """The times of at least so many passes of transformers' continuous batching, each with one token per sequence.

    Args:
        model: the target in transformers, with a paged attention.
        sequences: the tokens of each sequence before these passes, all of one length.
        passes: see above.

    Raises:
        ContinuousBatchingError: with its reason.
    """
    length, count = len(sequences[0]), len(sequences)
    batch_tokens = max(PREFILL_TOKENS, 2 * count)
    prefill_passes = -(-length * count // (batch_tokens - count)) + 1  # sequences that decode take part in them
    new = prefill_passes + passes + 1
    blocks = count * (-(-(length + new) // _BLOCK_SIZE) + 1)
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        block_size=_BLOCK_SIZE,
        num_blocks=blocks * 4 // 3,  # it starts no sequence while less than a fifth is free
        max_batch_tokens=batch_tokens,
    )
    manager = model.init_continuous_batching(generation_config=config, streaming=True)
    manager.start()
    try:
        manager.add_requests(sequences)
        instants = _token_instants(manager, count)
    finally:
        manager.stop(block=True)
    last_started = max(instants, key=lambda times: times[0])
    first_finished = min(times[-1] for times in instants)
    return [end - start for start, end in pairwise(last_started) if end <= first_finished]


def _token_instants(manager: Any, count: int) -> list[list[float]]:
    """When each of ``count`` sequences got each of its tokens."""
    instants: dict[str, list[float]] = {}
    finished = 0
    while finished < count:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise ContinuousBatchingError("transformers' continuous batching stopped; the log says why")
            continue
        if result.status is RequestStatus.FAILED:
            raise ContinuousBatchingError(f"transformers' continuous batching failed: {result.error}")
        instants.setdefault(result.request_id, []).append(time.perf_counter())
        finished += result.status is RequestStatus.FINISHED
    return list(instants.values())


def load_dense(model: str, dtype: str, torch_device: torch.device) -> Any:
    """The target as transformers runs it."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return loaded.eval().to(torch_device)


def seconds_of(work: Callable[[], object], torch_device: torch.device) -> float:
    """Wall-clock time of ``work``, including its kernels on the torch device."""
    began = time.perf_counter()
    work()
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)
    return time.perf_counter() - began


def measure_passes(target: TargetModel, dense: Any, contexts: Sequence[int], new: int) -> PassTimes:
    """Time forward passes of ``new`` tokens after contexts of these lengths, both kinds in turn."""
    generator = torch.Generator().manual_seed(0)
    size = target.vocabulary.size
    sequences = [torch.randint(size, (context + new,), generator=generator).tolist() for context in contexts]
    packed, dense_batch = PackedPassRunner(target, sequences, new), DensePassRunner(dense, sequences, new)
    seconds: dict[Callable[[], object], list[float]] = {packed.run: [], dense_batch.run: []}
    for _ in range(_REPEATS):
        for run, times in seconds.items():
            times.append(seconds_of(run, target.torch_device))
    packed.release()
    return PassTimes(*(median(times[_WARM_UP:]) for times in seconds.values()))
