"""Models as transformers loads them: a model folder, a hub name or a ``.gguf`` file.

Works with transformers 4.57 and 5.x. Knows files; not how a model is run.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from basestation.kv_cache.memory import check_fits, check_host, parameter_count
from basestation.target.attention import ATTENTION_NAME, packed_attention
from basestation.target.gguf_cache import cache_entry, fill
from basestation.target.quantized_weights import quantization_method, without_later_expansion
from basestation.target.supported_models import refuse_unsupported
from basestation.target.tensor_parallel import refuse_unsplittable
from basestation.target.vocabulary import Vocabulary
from common.chat_template import default_template
from common.error_text import first_line
from common.gguf_metadata import GgufVocabulary
from common.gguf_rope import refuse_gguf_rope
from common.hub import hub_folder
from common.stop_ids import StopSources, all_stop_ids, gguf_stop_sources, stop_sources
from protocol.errors import ModelError

logger = logging.getLogger(__name__)

_HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.safetensors")


def read_config(model: str, ranks: int = 1) -> Any:
    """The transformers configuration of a model folder, hub name or ``.gguf`` file, without its weights.

    Raises:
        ModelError: it cannot be found or read, or has an unsupported architecture.
        SettingsError: its heads do not divide among ``ranks``.
    """
    with _quiet_tools(), _named_failures(model):
        source, options = _source(model)
        if "gguf_file" in options:
            refuse_gguf_rope(Path(model))
        config = AutoConfig.from_pretrained(source, **options)
        refuse_unsupported(config)
    refuse_unsplittable(config, ranks)
    return config


def model_folder(model: str) -> Path:
    """The folder with the files of a model folder, hub name or ``.gguf`` file.

    Raises:
        ModelError: it cannot be found.
    """
    return Path(_source(model)[0])


def weight_files(
    model: str, dtype: torch.dtype, placement: torch.device, ranks: int, int8: bool, use_cache: bool
) -> str:
    """What to read: the model, or its converted ``.gguf`` file; memory is enough for it.

    Raises:
        ModelError: it does not fit, or the file cannot be converted.
    """
    files = _converted(model, dtype, placement, int8) if _is_gguf(model) and use_cache else model
    _check_memory(files, dtype, placement, ranks, int8)
    return files


def read_model(
    model: str, files: str, dtype: torch.dtype, placement: torch.device, int8: bool
) -> tuple[Any, Any, Vocabulary]:
    """The loaded model, its tokenizer and its vocabulary; of a ``.gguf`` file the tokenizer only for int8 weights.

    Args:
        model: a model folder, hub name or ``.gguf`` file.
        files: with its weights, which differ from it for a converted ``.gguf`` file.
        dtype: of the weights.
        placement: where they go.
        int8: whether linear layers may get int8 weights.

    Raises:
        ModelError: it cannot be read.
    """
    with _quiet_tools(), _named_failures(model):
        loaded = _load(files, dtype, placement)
        if not _is_gguf(model):
            tokenizer = _tokenizer(model)
            return loaded.eval(), tokenizer, _vocabulary(tokenizer, loaded)
        return loaded.eval(), _tokenizer(model) if int8 else None, _gguf_vocabulary(Path(model), loaded)


def tokenizer_json(model: str, tokenizer: Any) -> str:
    """The fast tokenizer as a ``tokenizer.json``; "" where there is none, as for a ``.gguf`` file."""
    backend = None if _is_gguf(model) else getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else ""


def register_attention() -> None:
    """Register packed attention with transformers, without cuDNN, which compiles a kernel for every new length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)


def _load(model: str, dtype: torch.dtype, placement: torch.device) -> Any:
    """A model folder, hub name or ``.gguf`` file, as transformers loads it: on CUDA without a copy on the host."""
    register_attention()
    source, gguf_file = _source(model)
    options: dict[str, Any] = {**gguf_file, "dtype": dtype, "attn_implementation": ATTENTION_NAME}
    config = None if gguf_file else read_config(model)
    if quantization_method(config) is not None:
        options["config"] = without_later_expansion(config)
    if placement.type == "cuda" or "config" in options:  # quantised weights cannot be moved later
        options["device_map"] = {"": str(placement)}
    return AutoModelForCausalLM.from_pretrained(source, **options)


def _check_memory(model: str, dtype: torch.dtype, placement: torch.device, ranks: int, int8: bool) -> None:
    """Refuse a model that does not fit where it runs, or whose tensors do not fit on the host on their way there.

    Raises:
        ModelError: with both sizes.
    """
    folder = model_folder(model)
    needed = check_fits(read_config(model), dtype, placement, folder, ranks, int8)
    if placement.type == "cuda":
        check_host(_largest_tensor(folder) or needed)


def _largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor in ``.safetensors`` files, from which they are read one at a time; 0 without any."""
    largest = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        ends = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
        largest = max(largest, *(end - start for start, end in ends))
    return largest


def _converted(model: str, dtype: torch.dtype, placement: torch.device, int8: bool) -> str:
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

        def load() -> Any:
            check_fits(config, dtype, placement, int8=int8)
            logger.info("converting %s once, into %s; with --no-cache it is converted at every start", model, entry)
            return _load(model, dtype, torch.device("cpu"))

        with _quiet_tools(), _named_failures(model):
            if not fill(entry, parameter_count(config) * dtype.itemsize, load):
                return model
    logger.info("%s is loaded as converted in %s", model, entry)
    return str(entry)


def _is_gguf(model: str) -> bool:
    return Path(model).suffix == ".gguf"


def _source(model: str) -> tuple[str, dict[str, str]]:
    """The path or hub name for transformers' ``from_pretrained``, and its options."""
    path = Path(model)
    if _is_gguf(model):
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
        raise ModelError(
            f"target model {model!r} cannot be loaded: {first_line(error)}; "
            "give a model folder, a hub name or a .gguf file"
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


def _tokenizer(model: str) -> Any:
    source, options = _source(model)
    return AutoTokenizer.from_pretrained(source, **options)


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
