"""Models without weights: the next token's logits come from a table indexed by the last two tokens.

They keep all tokens, as real models keep their KV cache, so a wrong rollback or a
token that runs twice changes the next logits.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import torch

from basestation.kv_cache.kv_pool import PAGE_SIZE, KVPool, SequenceKVCache
from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from common.grammar import GrammarCompiler
from device.drafting.draft_model import DraftModel
from protocol.bundle import CacheKind, Manifest, QualityFigures
from protocol.vocabulary import vocabulary_hash

Table = npt.NDArray[np.float32]  # [vocab_size, vocab_size, vocab_size]: logits after the last two tokens
QUALITY = QualityFigures(argmax_agreement=0.9, overlap=0.8, topk_acceptance=0.7, coupled_acceptance=0.8, positions=100)


def random_table(vocab_size: int, seed: int, sharpness: float = 1.5) -> Table:
    return np.random.default_rng(seed).normal(0, sharpness, (vocab_size,) * 3).astype(np.float32)


def blend(one: Table, other: Table, share: float) -> Table:
    """A mixture of two tables, so that some drafted tokens are accepted."""
    return (share * one + (1 - share) * other).astype(np.float32)


VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
PROMPT = [3, 1, 4, 1, 5]


def next_logits(table: Table, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    previous = tokens[-2] if len(tokens) > 1 else 0
    logits: npt.NDArray[np.float32] = table[previous, tokens[-1]]
    return logits


def token_names(vocab_size: int) -> dict[str, int]:
    return {f"t{token_id}": token_id for token_id in range(vocab_size)}


def manifest(vocab_size: int, stop_ids: tuple[int, ...] = (), context_length: int = 4096) -> Manifest:
    return Manifest(
        name="table",
        architecture="table",
        converter="none",
        precision="fp32",
        cache_kind=CacheKind.GROWING,
        vocab_size=vocab_size,
        vocabulary_hash=vocabulary_hash(token_names(vocab_size)),
        stop_ids=stop_ids,
        bos_token="",
        eos_token="",
        context_length=context_length,
        layers=1,
        kv_heads=1,
        head_size=1,
        quality=QualityFigures(1.0, 1.0, 1.0, 1.0, positions=1),
    )


@dataclass
class FakeDraftModel:
    table: Table
    manifest: Manifest
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    forked_length: int = 0

    @classmethod
    def make(cls, table: Table, stop_ids: tuple[int, ...] = (), context_length: int = 4096) -> DraftModel:
        return cast(DraftModel, cls(table, manifest(len(table), stop_ids, context_length)))

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def token_ids(self) -> list[int]:
        return self.tokens

    def fork(self, length: int) -> Self:
        """Another sequence; the passes of all are counted together."""
        fork = copy(self)
        fork.tokens = self.tokens[:length]
        fork.forked_length = length
        return fork

    def begin(self, prompt_ids: Sequence[int]) -> None:
        pass

    def room(self, token_ids: Sequence[int]) -> int:
        return max(0, self.manifest.context_length - len(token_ids))

    def forward(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        assert len(token_ids) > 0
        self.tokens += token_ids
        self.passes.append(len(token_ids))
        return self.next_logits()

    def next_logits(self) -> npt.NDArray[np.float32]:
        """Of the token after ``tokens``."""
        return next_logits(self.table, self.tokens)

    def rollback(self, length: int) -> None:
        del self.tokens[length:]


class FakeSequenceKVCache(SequenceKVCache):
    """A KV cache that also keeps the tokens."""

    def __init__(self, kv_pool: KVPool) -> None:
        super().__init__(kv_pool)
        self.tokens: list[int] = []

    def rollback(self, length: int) -> None:
        super().rollback(length)
        del self.tokens[self.length :]

    def share_prefix(self, source: SequenceKVCache, length: int) -> None:
        super().share_prefix(source, length)
        self.tokens = cast(FakeSequenceKVCache, source).tokens[:length]


@dataclass
class FakeTarget:
    table: Table
    stop_ids: frozenset[int] = frozenset()
    context_length: int = 4096
    name: str = "table"
    kv_pool: KVPool = field(default_factory=lambda: new_kv_pool(2**20))
    memory: int | None = None
    """Tokens in a forward pass above which it raises an out-of-memory error."""
    passes: list[int] = field(default_factory=list)
    """Sessions in each forward pass so far."""
    tokens: list[int] = field(default_factory=list)
    """Tokens in each forward pass so far."""
    gathered: int = 0
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    grammar_compiler: GrammarCompiler | None = None

    @classmethod
    def make(
        cls,
        table: Table,
        stop_ids: frozenset[int] = frozenset(),
        context_length: int = 4096,
        capacity: int = 2**20,
        memory: int | None = None,
        grammar_compiler: GrammarCompiler | None = None,
    ) -> TargetModel:
        fake = cls(table, stop_ids, context_length, "table", new_kv_pool(capacity), memory)
        fake.grammar_compiler = grammar_compiler
        return cast(TargetModel, fake)

    @property
    def vocabulary(self) -> Vocabulary:
        size = len(self.table)
        return Vocabulary(token_names(size), size, self.stop_ids)

    def new_kv_cache(self) -> SequenceKVCache:
        return FakeSequenceKVCache(self.kv_pool)

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        tokens = sum(len(segment.token_ids) for segment in segments)
        if self.memory is not None and tokens > self.memory:
            raise torch.OutOfMemoryError("more tokens than this fake target allows")
        self.passes.append(len(segments))
        self.tokens.append(tokens)
        return torch.cat([self._run(segment) for segment in segments])

    def next_logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of the token after ``tokens``."""
        return next_logits(self.table, tokens)

    def _run(self, segment: Segment) -> torch.Tensor:
        kv_cache = cast(FakeSequenceKVCache, segment.kv_cache)
        assert len(segment.token_ids) > 0
        assert kv_cache.length == len(kv_cache.tokens)
        kv_cache.reserve(kv_cache.length + len(segment.token_ids))
        rows = []
        for token_id in segment.token_ids:
            kv_cache.tokens.append(token_id)
            kv_cache.length += 1
            rows.append(self.next_logits(kv_cache.tokens))
        return torch.tensor(np.array(rows[len(rows) - segment.num_logits :])).reshape(-1, len(self.table))


def new_kv_pool(capacity: int) -> KVPool:
    return KVPool(capacity // PAGE_SIZE)


def target_alone(table: Table, prompt: Sequence[int], count: int) -> list[int]:
    """The target's own greedy tokens: the slow and obvious twin of every greedy answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(table, tokens).argmax()))
    return tokens[len(prompt) :]
