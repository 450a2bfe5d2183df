"""Packed passes of a large target against the dense batch, from one session to hundreds, on one torch device.

The target has random weights and is built where it runs: how long a pass takes
depends on shapes, not on what is said. Both kinds of pass use the same weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.kv_pool import ATTENTION_NAME, KVPool, KVShape
from basestation.memory import OutOfMemory, catch_out_of_memory, free_memory, parameter_count, readable_size
from basestation.target_model import TargetModel, Vocabulary, register_attention
from basestation.verify import Round, verify_rounds
from bench.setup.results import Row
from bench.station.passes import PREFILL_TOKENS, DensePass, PackedPass, seconds_of
from protocol.errors import SettingsError
from protocol.messages import Sampling

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,  # a fourth of the keys and values of 32, as models of this size have today
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
CASES = ("packed", "dense", "target")
_REPEATS = 12
_WARM_UP = 3


@dataclass(frozen=True)
class Combination:
    """So many sessions behind contexts of one length, each with a draft."""

    context: int
    sessions: int
    draft_len: int

    @property
    def new(self) -> int:
        """Tokens of each session in a pass: the last committed one and the draft."""
        return self.draft_len + 1


class Ceiling:
    """A target with random weights, and what its passes take.

    Args:
        shape: what a llama's configuration says of it, like ``SHAPES["7b"]``.
        dtype: of its weights, its keys and its values.
        torch_device: where it is built and runs.
    """

    def __init__(self, shape: dict[str, int], dtype: torch.dtype, torch_device: torch.device) -> None:
        self._config = AutoConfig.for_model("llama", max_position_embeddings=2**17, **shape)
        self._torch_device, self._dtype = torch_device, dtype
        heads, layers = shape["num_attention_heads"], shape["num_hidden_layers"]
        head_size = shape["hidden_size"] // heads
        self._kv = KVShape(layers, shape["num_key_value_heads"], head_size, self._dtype, torch_device)
        self._weights = parameter_count(self._config) * self._dtype.itemsize
        self._free = free_memory(torch_device)
        self._model: Any = None

    def rows(self, combination: Combination, advance: Callable[[], object]) -> Iterator[Row]:
        """A row for each of ``CASES``; one that does not fit says so, with the sizes, and was not tried."""
        for case in CASES:
            needed = self.needed(case, combination)
            seconds: float | None = None
            left_out: str | None = f"takes {readable_size(needed)}, {readable_size(self._free)} are free"
            if needed <= self._free:
                seconds, left_out = self._measure(case, combination)
            yield _row(case, combination, seconds, left_out)
            advance()

    def needed(self, case: str, combination: Combination) -> int:
        """Bytes that a case takes: weights, keys and values, and the largest tensors of a pass."""
        positions, copied = combination.context + combination.new, 0
        if case == "dense":  # its cache is copied a layer at a time to grow
            copied = combination.sessions * positions * self._kv.position_bytes // self._kv.layers
        else:
            positions = KVPool.rounded(positions)
        rows = combination.sessions * combination.new
        logits = rows * self._config.vocab_size * (self._dtype.itemsize + torch.float32.itemsize)
        hidden = 3 * max(rows, PREFILL_TOKENS, combination.context) * self._config.intermediate_size
        kept = self._weights + combination.sessions * positions * self._kv.position_bytes
        return int(kept + copied + logits + hidden * self._dtype.itemsize)

    def _measure(self, case: str, combination: Combination) -> tuple[float | None, str | None]:
        """Seconds of a pass; where the memory is short in spite of the estimate, what PyTorch says of it."""
        shortage = ""
        try:
            with catch_out_of_memory():
                return self._seconds(case, combination), None
        except OutOfMemory as error:
            shortage = str(error).splitlines()[0]
        return None, shortage

    def _seconds(self, case: str, combination: Combination) -> float:
        self._model = self._model or self._build()
        new = 1 if case == "target" else combination.new
        texts = self._texts(combination, new)
        if case == "dense":
            self._model.set_attn_implementation("sdpa")
            dense = DensePass(self._model, texts, new)
            return self._median(dense.run)
        self._model.set_attn_implementation(ATTENTION_NAME)
        vocabulary = Vocabulary(self._config.vocab_size, bytes(32), frozenset())
        target = TargetModel(self._model, vocabulary, "random", self._free)
        packed = PackedPass(target, texts, new)
        rounds = [Round(Sampling(), combination.context + 1, tuple(text[-new:][1:])) for text in texts]
        try:
            return self._median(lambda: verify_rounds(packed.run(), rounds))
        finally:
            packed.release()

    def _build(self) -> Any:
        register_attention()
        torch.manual_seed(0)
        with self._torch_device:
            model = AutoModelForCausalLM.from_config(
                self._config, dtype=self._dtype, attn_implementation=ATTENTION_NAME
            )
        return model.eval()

    def _texts(self, combination: Combination, new: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        shape = combination.sessions, combination.context + new
        texts: list[list[int]] = torch.randint(self._config.vocab_size, shape, generator=generator).tolist()
        return texts

    def _median(self, run: Callable[[], object]) -> float:
        return median([seconds_of(run, self._torch_device) for _ in range(_WARM_UP + _REPEATS)][_WARM_UP:])


def combinations(contexts: Sequence[int], sessions: Sequence[int], draft_len: int) -> list[Combination]:
    """All of them.

    Raises:
        SettingsError: one of the numbers is less than 1.
    """
    for option, values in (("context", contexts), ("sessions", sessions), ("draft-len", (draft_len,))):
        if min(values) < 1:
            raise SettingsError(option, min(values), "1 and more")
    return [Combination(context, count, draft_len) for context in contexts for count in sessions]


def card(torch_device: torch.device) -> str:
    """The name of the graphics card that a device is, or ``none``."""
    return torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "none"


def compare(rows: Sequence[Row]) -> list[Row]:
    """For each combination: the packed pass over the dense one, and what drafts that all stand gain over no drafts."""
    found = {(row["context"], row["sessions"], row["case"]): row for row in rows}
    compared: list[Row] = []
    for (context, sessions, case), packed in found.items():
        if case != "packed":
            continue
        dense, target = (found[context, sessions, other] for other in ("dense", "target"))
        compared.append(
            {
                "case": "compared",
                "context": context,
                "sessions": sessions,
                "of_the_ceiling": _ratio(dense["milliseconds"], packed["milliseconds"]),
                "most_over_target": _ratio(packed["tokens_per_second"], target["tokens_per_second"]),
            }
        )
    return compared


def _ratio(one: object, other: object) -> float | None:
    return one / other if isinstance(one, float) and isinstance(other, float) else None


def _row(case: str, combination: Combination, seconds: float | None, left_out: str | None) -> Row:
    tokens = combination.sessions * (1 if case == "target" else combination.new)
    return {
        "case": case,
        "context": combination.context,
        "sessions": combination.sessions,
        "milliseconds": None if seconds is None else 1e3 * seconds,
        "tokens_per_second": None if seconds is None else tokens / seconds,
        "left_out": left_out,
    }
