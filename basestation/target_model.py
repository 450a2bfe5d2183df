"""The target model: a transformers causal language model that runs packed batches.

Works with transformers 4.57 and 5.x. Knows tokens and logits; not drafts.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from basestation.attention import ATTENTION_NAME, PackedBatch, packed_attention
from basestation.gguf_cache import cache_entry, fill
from basestation.kv_pool import KVPool, KVShape, SequenceKVCache
from basestation.memory import check_fits, kv_budget, parameter_count, readable_size
from basestation.packed_linear import pack_linears
from basestation.segment import Segment
from basestation.supported_models import refuse_gguf_rope, refuse_unsupported
from basestation.vocabulary import Vocabulary
from common.chat_template import default_template
from common.gguf_metadata import GgufVocabulary
from common.grammar import GrammarCompiler, is_available
from common.hub import hub_folder, model_name
from common.stop_ids import StopSources, all_stop_ids, gguf_stop_sources, stop_sources
from protocol.errors import ModelError, SettingsError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.safetensors")
_MIN_CONTEXT = 128
_MAX_UNPADDED_ROWS = 32
"""Row counts above it are padded on a CPU: by up to 7 rows, above 256 by up to a sixteenth."""


class TargetModel:
    """A loaded target model.

    Attributes:
        name: the last part of its path or hub name.
        vocabulary: see ``Vocabulary``.
        context_length: the model's, or the KV pool's capacity if that is less.
        kv_pool: for the KV caches of its sessions.
        grammar_compiler: for its vocabulary; None without llguidance or the tokenizer's file.

    Args:
        model: a transformers model, on its PyTorch device.
        vocabulary: see ``Vocabulary``.
        name: see above.
        kv_bytes: memory for the KV pool.
        tokenizer_json: the tokenizer as a ``tokenizer.json``; "" if there is none.

    Raises:
        SettingsError: ``kv_bytes`` is not enough for one session.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, name: str, kv_bytes: int, tokenizer_json: str = "") -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.torch_device = next(model.parameters()).device
        self._model = model
        self.kv_pool = new_kv_pool(model.config, model.dtype, self.torch_device, kv_bytes)
        self.context_length = context_length(model.config, self.kv_pool)
        self.grammar_compiler = (
            GrammarCompiler.of_tokenizer(tokenizer_json, vocabulary.size, vocabulary.stop_ids)
            if tokenizer_json and is_available()
            else None
        )

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "auto",
        torch_device: str = "auto",
        kv_memory: str = "auto",
        use_cache: bool = True,
    ) -> "TargetModel":
        """Load a model folder, hub name or ``.gguf`` file.

        Args:
            model: the path or name.
            dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on CUDA, float32 elsewhere.
            torch_device: a PyTorch device, or ``auto``: CUDA if available.
            kv_memory: for the KV pool, like ``4GiB``, or ``auto``: of the memory that is free
                after loading, nine tenths on CUDA and half elsewhere.
            use_cache: whether a ``.gguf`` file is converted once and kept; see ``basestation/gguf_cache.py``.

        Raises:
            SettingsError: the dtype or the device does not exist, or the KV pool is too small.
            ModelError: it cannot be found or read, does not fit, or has an unsupported architecture.
        """
        placement = choose_placement(torch_device)
        precision = choose_dtype(dtype, placement)
        kv_budget(kv_memory, placement)  # refuse an invalid size before the slow part
        register_attention()
        is_gguf = Path(model).suffix == ".gguf"
        weights = _converted(model, precision, placement) if is_gguf and use_cache else model
        check_fits(read_config(weights), precision, placement)
        with _quiet_tools(), _named_failures(model):
            loaded = _load(weights, precision)
            tokenizer = None if is_gguf else AutoTokenizer.from_pretrained(_source(model)[0])
            vocabulary = _vocabulary(tokenizer, loaded) if tokenizer else _gguf_vocabulary(Path(model), loaded)
        loaded.eval().to(placement)
        if placement.type == "cpu":
            pack_linears(loaded)
        return cls(loaded, vocabulary, model_name(model), kv_budget(kv_memory, placement), _tokenizer_json(tokenizer))

    def new_kv_cache(self) -> SequenceKVCache:
        """An empty KV cache for one session."""
        return SequenceKVCache(self.kv_pool)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run all segments in one forward pass and append their tokens to their KV caches.

        Returns:
            The logits [rows, V], float32, of the last ``num_logits`` tokens of each segment, in order.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for segment in segments:
            past, new = segment.kv_cache.length, len(segment.token_ids)
            token_ids += segment.token_ids
            positions += range(past, past + new)
            logit_rows += range(len(token_ids) - segment.num_logits, len(token_ids))
        rows, kept = [token_ids, positions], logit_rows or [0]
        if self.torch_device.type == "cpu":
            rows, kept = [_padded(row) for row in rows], _padded(kept)
        logits = self._run(rows, kept, PackedBatch(segments))
        for segment in segments:
            segment.kv_cache.length += len(segment.token_ids)
        return logits[: len(logit_rows)]

    def _run(self, rows: list[list[int]], logit_rows: list[int], packed_batch: PackedBatch) -> Tensor:
        ids_positions = torch.tensor(rows, device=self.torch_device)
        output = self._model(
            input_ids=ids_positions[:1],
            position_ids=ids_positions[1:],
            use_cache=False,
            logits_to_keep=torch.tensor(logit_rows, device=self.torch_device),
            packed_batch=packed_batch,
        )
        logits: Tensor = output.logits[0, :, : self.vocabulary.size].float()
        return logits


def _padded(row: list[int]) -> list[int]:
    """Pad with zeros to one of a few lengths.

    Row counts are padded to a few buckets, so that oneDNN's primitive cache stays bounded.
    Creating the primitives for a new row count takes a tenth of a forward pass.
    """
    step = max(8, 2 ** (len(row).bit_length() - 5)) if len(row) > _MAX_UNPADDED_ROWS else 1
    return row + [0] * (-len(row) % step)


def read_config(model: str) -> Any:
    """The transformers configuration of a model folder, hub name or ``.gguf`` file, without its weights.

    Raises:
        ModelError: it cannot be found or read, or has an unsupported architecture.
    """
    with _quiet_tools(), _named_failures(model):
        source, options = _source(model)
        if "gguf_file" in options:
            refuse_gguf_rope(Path(model))
        config = AutoConfig.from_pretrained(source, **options)
        refuse_unsupported(config)
    return config


def new_kv_pool(config: Any, dtype: torch.dtype, torch_device: torch.device, kv_bytes: int) -> KVPool:
    """The KV pool of a model, with ``kv_bytes`` of memory.

    Raises:
        SettingsError: that is not enough for one session.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    shape = KVShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        torch_device=torch_device,
    )
    capacity, minimum = kv_bytes // shape.position_bytes, KVPool.round_up(_MIN_CONTEXT)
    if capacity < minimum:
        needed = readable_size(minimum * shape.position_bytes)
        raise SettingsError("kv-memory", readable_size(kv_bytes), f"{needed} or more, for {minimum} tokens")
    return KVPool(shape, capacity)


def context_length(config: Any, kv_pool: KVPool) -> int:
    """The model's context length, or the KV pool's capacity if that is less."""
    minimum = KVPool.round_up(_MIN_CONTEXT)
    return min(int(config.get_text_config().max_position_embeddings), kv_pool.capacity // minimum * minimum)


def choose_placement(torch_device: str) -> torch.device:
    """The PyTorch device with that name; ``auto`` is CUDA if available, else the CPU.

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
    """The data type with that name; ``auto`` is bfloat16 on CUDA, float32 elsewhere.

    Raises:
        SettingsError: targets do not run in this type.
    """
    if dtype == "auto":
        return torch.bfloat16 if placement.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise SettingsError("dtype", dtype, f"auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _load(model: str, dtype: torch.dtype) -> Any:
    """A model folder, hub name or ``.gguf`` file, as transformers loads it."""
    source, options = _source(model)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=ATTENTION_NAME, **options)


def _converted(model: str, dtype: torch.dtype, placement: torch.device) -> str:
    """The folder of a converted ``.gguf`` file, converted now if it is not there; the file itself if it cannot be kept.

    Raises:
        ModelError: the file cannot be read, does not fit, or has an unsupported architecture.
    """
    with _named_failures(model):
        _source(model)
        entry = cache_entry(Path(model), dtype)
    if entry is None:
        return model
    if not entry.is_dir():
        config = read_config(model)
        check_fits(config, dtype, placement)
        logger.info("converting %s once, into %s; with --no-cache it is converted at every start", model, entry)
        with _quiet_tools(), _named_failures(model):
            if not fill(entry, parameter_count(config) * dtype.itemsize, lambda: _load(model, dtype)):
                return model
    logger.info("%s is loaded as converted in %s", model, entry)
    return str(entry)


def _source(model: str) -> tuple[str, dict[str, str]]:
    """The path or hub name for transformers' ``from_pretrained``, and its options."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{model!r} does not exist; give a model folder, a hub name or a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{model!r} is not a model folder: it contains no config.json")
    return (model if path.is_dir() else str(hub_folder(model, _HUB_FILES))), {}


@contextlib.contextmanager
def _named_failures(model: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"target model {model!r} cannot be loaded: {reason[0]}; give a model folder, a hub name or a .gguf file"
        ) from error


@contextlib.contextmanager
def _quiet_tools() -> Iterator[None]:
    """Silence the warnings of transformers and the hub client."""
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
    """Register packed attention with transformers, without cuDNN, which compiles a kernel for every new length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)


def _vocabulary(tokenizer: Any, model: Any) -> Vocabulary:
    ids: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    sources = stop_sources(
        {
            "config.json": model.config.get_text_config().eos_token_id,
            "generation_config.json": model.generation_config.eos_token_id,
            "tokenizer": tokenizer.eos_token_id,
        },
        {entry.content: token_id for token_id, entry in added.items()},
        default_template(tokenizer.chat_template),
        {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
    )
    return Vocabulary(ids, model.get_output_embeddings().weight.shape[0], _logged(sources))


def _tokenizer_json(tokenizer: Any) -> str:
    """The fast tokenizer as a ``tokenizer.json``; "" where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else ""


def _gguf_vocabulary(path: Path, model: Any) -> Vocabulary:
    found = GgufVocabulary.read(path)
    tokens = {token: token_id for token_id, token in enumerate(found.tokens)}
    return Vocabulary(tokens, model.get_output_embeddings().weight.shape[0], _logged(gguf_stop_sources(found)))


def _logged(sources: StopSources) -> frozenset[int]:
    """The stop ids of all sources; a log line says which names which where they disagree."""
    ids = all_stop_ids(sources)
    if any(named != ids for named in sources.values()):
        told = "; ".join(f"{source}: {sorted(named)}" for source, named in sources.items())
        logger.info("stop ids %s, from %s", sorted(ids), told)
    return ids
