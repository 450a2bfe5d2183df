"""Packed forward passes of a large target against transformers' own, from one session to hundreds, on one torch device.

The target has random weights and is built on the torch device: the time of a pass
depends on shapes, not on tokens. All kinds of pass use the same weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.kv_cache.kv_pages import KVShape
from basestation.kv_cache.memory import OutOfMemory, catch_out_of_memory, free_memory, parameter_count
from basestation.sizes import readable_size
from basestation.target.attention import ATTENTION_NAME
from basestation.target.placement import choose_dtype, choose_placement
from basestation.target.pretrained import register_attention
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from basestation.verification.verify import RoundToVerify, verify_rounds
from bench.setup.options import DraftLenOption, DtypeOption, JsonOption, TorchDeviceOption, console, progress_bar
from bench.setup.results import Results, Row
from bench.station.passes import (
    PREFILL_TOKENS,
    ContinuousBatchingError,
    DensePassRunner,
    PackedPassRunner,
    continuous_batching_seconds,
    seconds_of,
)
from common.error_text import first_line
from protocol.errors import SettingsError
from protocol.messages import Sampling

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
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
CASES = ("packed", "dense", "continuous", "target")
RIVALS = ("dense", "continuous")
_ONE_TOKEN = ("continuous", "target")
"""Cases whose passes run one token per session."""
_REPEATS = 12
_WARM_UP = 3


def ceiling(
    shape: Annotated[str, typer.Option(help="Shape of the target: 7b or 135m.")] = "7b",
    dtype: DtypeOption = "bfloat16",
    torch_device: TorchDeviceOption = "auto",
    sessions: Annotated[
        list[int] | None,
        typer.Option(help="Sessions in one forward pass; repeatable. Default: 1, 4, 16, 64 and 256.", min=1),
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--context", help="Context length; repeatable. Default: 512 and 2048.", min=1)
    ] = None,
    draft_len: DraftLenOption = 5,
    json_file: JsonOption = None,
) -> None:
    """Compare passes of a large target with transformers' own and with target-only decoding; meant for CUDA."""
    if shape not in SHAPES:
        raise SettingsError("shape", shape, " or ".join(SHAPES))
    wanted = combinations(contexts or (512, 2048), sessions or (1, 4, 16, 64, 256), draft_len)
    placement = choose_placement(torch_device)
    described: Row = {"card": card(placement), "shape": shape, "dtype": dtype, "draft_len": draft_len}
    measured = Ceiling(SHAPES[shape], choose_dtype(dtype, placement), placement)
    rows: list[Row] = []
    with progress_bar() as progress:
        task = progress.add_task("cases", total=len(wanted) * len(CASES))
        for combination in wanted:
            rows += measured.rows(combination, lambda: progress.advance(task))
            Results(described, [*rows, *compare(rows)]).write(json_file)
    Results(described, [*rows, *compare(rows)]).show(console)


@dataclass(frozen=True)
class Combination:
    """A number of sessions with contexts of one length, each with a draft."""

    context: int
    sessions: int
    draft_len: int

    @property
    def new(self) -> int:
        """Tokens per session in a pass: the last committed token and the draft."""
        return self.draft_len + 1


class Ceiling:
    """A target with random weights, and the times of its forward passes.

    Args:
        shape: values of a Llama configuration, like ``SHAPES["7b"]``.
        dtype: of weights and KV cache.
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
        """A row for each of ``CASES``; one that does not fit into memory is skipped, and its row says why."""
        for case in CASES:
            needed = self.needed(case, combination)
            seconds: float | None = None
            skipped: str | None = f"needs {readable_size(needed)}, {readable_size(self._free)} are free"
            if needed <= self._free:
                seconds, skipped = self._measure(case, combination)
            yield _row(case, combination, seconds, skipped)
            advance()

    def needed(self, case: str, combination: Combination) -> int:
        """Bytes that a case needs: weights, KV cache and the largest tensors of a pass."""
        positions, copied = combination.context + combination.new, 0
        if case in RIVALS:  # transformers repeats keys and values of a layer for all query heads
            groups = self._config.num_attention_heads // self._config.num_key_value_heads
            copied = groups * combination.sessions * positions * self._kv.position_bytes // self._kv.layers
        else:
            positions = -(-positions // self._kv.page_size) * self._kv.page_size
        if case == "continuous":  # a mask of all sessions' positions for each token of a pass
            copied += combination.sessions * positions * PREFILL_TOKENS * self._dtype.itemsize
        rows = combination.sessions * combination.new
        logits = rows * self._config.vocab_size * (self._dtype.itemsize + torch.float32.itemsize)
        hidden = 3 * max(rows, PREFILL_TOKENS, combination.context) * self._config.intermediate_size
        spare = 0 if case in RIVALS else self._kv.page_bytes
        cached = self._weights + combination.sessions * positions * self._kv.position_bytes + spare
        return int(cached + copied + logits + hidden * self._dtype.itemsize)

    def _measure(self, case: str, combination: Combination) -> tuple[float | None, str | None]:
        """Seconds of a pass; or why there are none, as if memory runs out in spite of the estimate."""
        if case == "continuous" and self._torch_device.type != "cuda":
            return None, "transformers sizes the pages of continuous batching by a GPU's memory"
        try:
            with catch_out_of_memory():
                return self._seconds(case, combination), None
        except (OutOfMemory, ContinuousBatchingError) as error:
            return None, first_line(error)

    def _seconds(self, case: str, combination: Combination) -> float:
        self._model = self._model or self._build()
        new = 1 if case in _ONE_TOKEN else combination.new
        sequences = self._sequences(combination, new)
        if case == "dense":
            self._model.set_attn_implementation("sdpa")
            dense = DensePassRunner(self._model, sequences, new)
            return self._median(dense.run)
        if case == "continuous":
            self._model.set_attn_implementation("sdpa_paged")
            contexts = [tokens[:-new] for tokens in sequences]
            return median(continuous_batching_seconds(self._model, contexts, _WARM_UP + _REPEATS)[_WARM_UP:])
        self._model.set_attn_implementation(ATTENTION_NAME)
        vocabulary = _vocabulary(self._config.vocab_size)
        pages = combination.sessions * -(-(combination.context + new) // self._kv.page_size)
        memory = (pages + 1) * self._kv.page_bytes  # one page for CUDA graphs
        target = TargetModel(self._model, vocabulary, "random", memory, cuda_graphs=True)
        packed = PackedPassRunner(target, sequences, new)
        rounds = [RoundToVerify(Sampling(), combination.context + 1, tuple(tokens[-new:][1:])) for tokens in sequences]
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

    def _sequences(self, combination: Combination, new: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        shape = combination.sessions, combination.context + new
        sequences: list[list[int]] = torch.randint(self._config.vocab_size, shape, generator=generator).tolist()
        return sequences

    def _median(self, run: Callable[[], object]) -> float:
        return median([seconds_of(run, self._torch_device) for _ in range(_WARM_UP + _REPEATS)][_WARM_UP:])


def combinations(contexts: Sequence[int], sessions: Sequence[int], draft_len: int) -> list[Combination]:
    """Every context length with every number of sessions.

    Raises:
        SettingsError: a number is less than 1.
    """
    for option, values in (("context", contexts), ("sessions", sessions), ("draft-len", (draft_len,))):
        if min(values) < 1:
            raise SettingsError(option, min(values), "1 or more")
    return [Combination(context, count, draft_len) for context in contexts for count in sessions]


def card(torch_device: torch.device) -> str:
    """The name of the GPU, or ``none``."""
    return torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "none"


def compare(rows: Sequence[Row]) -> list[Row]:
    """For each combination the packed pass relative to the best rival, and the largest possible gain of drafting.

    Both are ratios of tokens per second, all drafted tokens accepted; the gain is over target-only decoding.
    """
    found = {(row["context"], row["sessions"], row["case"]): row for row in rows}
    compared: list[Row] = []
    for (context, sessions, case), packed in found.items():
        if case != "packed":
            continue
        rivals = [found[context, sessions, rival]["tokens_per_second"] for rival in RIVALS]
        best = max((speed for speed in rivals if isinstance(speed, float)), default=None)
        target = found[context, sessions, "target"]
        compared.append(
            {
                "case": "comparison",
                "context": context,
                "sessions": sessions,
                "share_of_ceiling": _ratio(packed["tokens_per_second"], best),
                "max_gain_over_target": _ratio(packed["tokens_per_second"], target["tokens_per_second"]),
            }
        )
    return compared


def _vocabulary(size: int) -> Vocabulary:
    return Vocabulary({f"t{token_id}": token_id for token_id in range(size)}, size, frozenset())


def _ratio(one: object, other: object) -> float | None:
    return one / other if isinstance(one, float) and isinstance(other, float) else None


def _row(case: str, combination: Combination, seconds: float | None, skipped: str | None) -> Row:
    tokens = combination.sessions * (1 if case in _ONE_TOKEN else combination.new)
    return {
        "case": case,
        "context": combination.context,
        "sessions": combination.sessions,
        "milliseconds": None if seconds is None else 1e3 * seconds,
        "tokens_per_second": None if seconds is None else tokens / seconds,
        "skipped": skipped,
    }
