"""The packed pass against transformers' own dense batch of the same tokens, padded where lengths differ."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from basestation.kv_pool import Segment, SequenceKVCache
from basestation.target_model import DTYPES, TargetModel

REPEATS = 15
PREFILL_TOKENS = 4096
"""Tokens of all sessions in one step of a dense prefill."""


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a pass, the median of some, the two kinds in turn."""

    packed: float
    dense: float


class DensePass:
    """A batch of a DynamicCache, padded on the left."""

    def __init__(self, model: Any, texts: Sequence[list[int]], new: int) -> None:
        self._model = model
        longest = max(map(len, texts))
        rows = torch.zeros((len(texts), longest), dtype=torch.int64, device=model.device)
        self._mask = torch.zeros_like(rows)
        for row, text in enumerate(texts):
            rows[row, longest - len(text) :] = torch.tensor(text)
            self._mask[row, longest - len(text) :] = 1
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        self._past = longest - new
        self._new_ids = rows[:, self._past :]
        self._cache = DynamicCache()
        step = max(1, PREFILL_TOKENS // len(texts))
        for start in range(0, self._past, step):
            end = min(start + step, self._past)
            self._run(rows[:, start:end], slice(start, end), logits_to_keep=1)

    def run(self) -> None:
        """One pass over the new tokens; the cache is as before."""
        self._run(self._new_ids, slice(self._past, self._mask.shape[1]))
        self._cache.crop(self._past)

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor, places: slice, logits_to_keep: int = 0) -> None:
        self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : places.stop],
            position_ids=self._positions[:, places],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )


class PackedPass:
    """The same tokens as the base station runs them, the first ``shared`` of each being held in common."""

    def __init__(self, target: TargetModel, texts: Sequence[list[int]], new: int, shared: int = 0) -> None:
        self._target = target
        self._kv_caches: list[SequenceKVCache] = [target.new_kv_cache() for _ in texts]
        self._segments = [Segment(one, text[-new:], new) for one, text in zip(self._kv_caches, texts, strict=True)]
        self._lengths = [len(text) - new for text in texts]
        for kv_cache, text in zip(self._kv_caches, texts, strict=True):
            if shared and kv_cache is not self._kv_caches[0]:
                kv_cache.join(self._kv_caches[0], shared)
            target.forward([Segment(kv_cache, text[kv_cache.length : -new], 0)])

    def run(self) -> torch.Tensor:
        """One pass over the new tokens, and its logits; the kv_caches are as before."""
        logits = self._target.forward(self._segments)
        for kv_cache, length in zip(self._kv_caches, self._lengths, strict=True):
            kv_cache.rollback(length)
        return logits

    def release(self) -> None:
        """Give the room back."""
        for kv_cache in self._kv_caches:
            kv_cache.release()


def load_dense(model: str, dtype: str, torch_device: torch.device) -> Any:
    """The target as transformers runs it."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return loaded.eval().to(torch_device)


def seconds_of(work: Callable[[], object], torch_device: torch.device) -> float:
    """How long some work takes, the device's included."""
    began = time.perf_counter()
    work()
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)
    return time.perf_counter() - began


def measure_passes(target: TargetModel, dense: Any, lengths: Sequence[int], new: int) -> PassTimes:
    """Passes of ``new`` tokens behind contexts of these lengths, both kinds in turn."""
    generator = torch.Generator().manual_seed(0)
    size = target.vocabulary.size
    texts = [torch.randint(size, (length + new,), generator=generator).tolist() for length in lengths]
    packed_pass, dense_pass = PackedPass(target, texts, new), DensePass(dense, texts, new)
    seconds: dict[Callable[[], object], list[float]] = {packed_pass.run: [], dense_pass.run: []}
    for _ in range(REPEATS):
        for run, spent in seconds.items():
            spent.append(seconds_of(run, target.torch_device))
    packed_pass.release()
    packed, densely = (median(spent[2:]) for spent in seconds.values())
    return PassTimes(packed, densely)
