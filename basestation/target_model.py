"""The target model: a transformers causal language model that runs packed passes.

Runs on transformers 4.57 and 5.x. Knows tokens and logits; not what a draft is.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from basestation.kv_pool import ATTENTION_NAME, KVPool, KVShape, PackedPass, Segment, SequenceKVCache, packed_attention
from basestation.memory import check_fits, kv_budget, readable_size
from basestation.packed_linear import pack_linears
from protocol.bundle import stop_ids, vocabulary_hash
from protocol.errors import ModelError, SettingsError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUPPORTED = (
    "gemma",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)
"""Architectures whose packed passes the tests hold against their own forward passes."""
_LEAST_CONTEXT = 128
_UNFILLED_ROWS = 32
"""A pass of more rows is filled with idle ones on a CPU: up to seven, or a sixteenth of more than 256."""


@dataclass(frozen=True)
class Vocabulary:
    """What must agree with the draft model: ids, tokens and which of them end an answer."""

    size: int
    sha256: bytes
    stop_ids: frozenset[int]


class TargetModel:
    """A loaded target model.

    Attributes:
        name: for people, the last part of where it came from.
        vocabulary: see ``Vocabulary``.
        context_length: positions it was made for, or as many as the kv_pool holds if those are fewer.
        kv_pool: where the keys and values of its sessions lie.

    Args:
        model: of transformers, on its device.
        vocabulary: see ``Vocabulary``.
        name: see above.
        kv_bytes: what keys and values may take.

    Raises:
        SettingsError: that is not enough for one session.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, name: str, kv_bytes: int) -> None:
        config = model.config.get_text_config()
        self.name = name
        self.vocabulary = vocabulary
        self.torch_device = next(model.parameters()).device
        self._model = model
        heads = config.num_attention_heads
        shape = KVShape(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=model.dtype,
            torch_device=self.torch_device,
        )
        capacity = kv_bytes // shape.position_bytes
        least = KVPool.rounded(_LEAST_CONTEXT)
        if capacity < least:
            needed = readable_size(least * shape.position_bytes)
            raise SettingsError("kv-memory", readable_size(kv_bytes), f"{needed} and more, for {least} tokens")
        self.kv_pool = KVPool(shape, capacity)
        self.context_length = min(int(config.max_position_embeddings), capacity // least * least)

    @classmethod
    def load(
        cls, model: str, dtype: str = "auto", torch_device: str = "auto", kv_memory: str = "auto"
    ) -> "TargetModel":
        """Load a model folder, hub name or ``.gguf`` file.

        Args:
            model: where it is.
            dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on CUDA, float32 elsewhere.
            torch_device: a name PyTorch knows, or ``auto``: CUDA where there is one.
            kv_memory: for keys and values, like ``4GiB``, or ``auto``: of what the model leaves
                nine tenths on CUDA, half elsewhere.

        Raises:
            SettingsError: no such dtype or device, or not enough memory for keys and values.
            ModelError: it cannot be found or read, does not fit, or is of an architecture that is not supported.
        """
        placement = choose_placement(torch_device)
        precision = choose_dtype(dtype, placement)
        kv_budget(kv_memory, placement)  # what is no size is refused before what takes long
        register_attention()
        with _quiet_tools(), _named_failures(model):
            place, options = _source(model)
            config = AutoConfig.from_pretrained(place, **options)
            refuse_unsupported(config)
            check_fits(config, precision, placement)
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            loaded = AutoModelForCausalLM.from_pretrained(
                place, dtype=precision, attn_implementation=ATTENTION_NAME, **options
            )
        vocabulary = _vocabulary(tokenizer, loaded)
        loaded.eval().to(placement)
        if placement.type == "cpu":
            pack_linears(loaded)
        return cls(loaded, vocabulary, Path(model).stem, kv_budget(kv_memory, placement))

    def new_kv_cache(self) -> SequenceKVCache:
        """An empty place for one session's keys and values."""
        return SequenceKVCache(self.kv_pool)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run all segments in one pass and count their positions as cached.

        Returns:
            The logits [rows, V], float32, of the last ``judged`` tokens of each segment, one segment after the other.
        """
        flat: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for segment in segments:
            past, new = segment.kv_cache.length, len(segment.token_ids)
            flat += segment.token_ids
            positions += range(past, past + new)
            wanted += range(len(flat) - segment.num_logits, len(flat))
        rows, judged = [flat, positions], wanted or [0]
        if self.torch_device.type == "cpu":
            rows, judged = [_filled(row) for row in rows], _filled(judged)
        logits = self._run(rows, judged, PackedPass(segments))
        for segment in segments:
            segment.kv_cache.length += len(segment.token_ids)
        return logits[: len(wanted)]

    def _run(self, rows: list[list[int]], judged: list[int], packed_pass: PackedPass) -> Tensor:
        ids_positions = torch.tensor(rows, device=self.torch_device)
        output = self._model(
            input_ids=ids_positions[:1],
            position_ids=ids_positions[1:],
            use_cache=False,
            logits_to_keep=torch.tensor(judged, device=self.torch_device),
            packed_pass=packed_pass,
        )
        logits: Tensor = output.logits[0, :, : self.vocabulary.size].float()
        return logits


def _filled(row: list[int]) -> list[int]:
    """The row with zeros behind it, so that of the many lengths that occur those that differ little are one.

    For each length oneDNN prepares its matrix products, which takes a tenth of a pass, and keeps what it prepared.
    """
    step = max(8, 2 ** (len(row).bit_length() - 5)) if len(row) > _UNFILLED_ROWS else 1
    return row + [0] * (-len(row) % step)


def choose_placement(torch_device: str) -> torch.device:
    """The device of that name, or with ``auto`` CUDA where there is one.

    Raises:
        SettingsError: this machine has no such device.
    """
    if torch_device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        placement = torch.device(torch_device)
        torch.empty(0, device=placement)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            "torch-device", torch_device, f"auto, cpu or a device of this machine ({reason})"
        ) from error
    return placement


def choose_dtype(dtype: str, placement: torch.device) -> torch.dtype:
    """The data type of that name, or with ``auto`` bfloat16 on CUDA, float32 elsewhere.

    Raises:
        SettingsError: it is none that a target runs in.
    """
    if dtype == "auto":
        return torch.bfloat16 if placement.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise SettingsError("dtype", dtype, f"auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _source(model: str) -> tuple[str, dict[str, str]]:
    """Where transformers shall read ``model``, and with which options."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{model!r} does not exist; name a model folder, a hub name or a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{model!r} is no model folder: it holds no config.json")
    return model, {}


@contextlib.contextmanager
def _named_failures(model: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"target model {model!r} cannot be loaded: {reason[0]}; name a model folder, a hub name or a .gguf file"
        ) from error


@contextlib.contextmanager
def _quiet_tools() -> Iterator[None]:
    """Keep the advice and retries of transformers and the hub away from operators."""
    hub = logging.getLogger("huggingface_hub")
    level, verbosity = hub.level, transformers_logging.get_verbosity()
    hub.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


def register_attention() -> None:
    """Make packed attention known to transformers."""
    transformers.AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)


def refuse_unsupported(config: Any) -> None:
    """Refuse what packed passes are not tested with.

    Raises:
        ModelError: names the architecture, and those that are supported.
    """
    architecture = config.get_text_config().model_type
    if architecture not in SUPPORTED or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}")


def _vocabulary(tokenizer: Any, model: Any) -> Vocabulary:
    ids: dict[str, int] = tokenizer.get_vocab()
    stops = stop_ids(model.config.get_text_config().eos_token_id, model.generation_config.eos_token_id)
    size = min(max(ids.values()) + 1, model.get_output_embeddings().weight.shape[0])
    return Vocabulary(size, bytes.fromhex(vocabulary_hash(ids)), stops)
