"""Source models: from a folder, a hub name or a GGUF file to a model folder.

Knows how transformers reads and writes models. Does not know how a model is
converted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.chat_template import default_template
from common.error_text import first_line
from common.gguf_metadata import GgufVocabulary
from common.gguf_rope import refuse_gguf_rope
from common.hub import hub_folder
from common.stop_ids import GGUF_STOP_ROLES, StopSources, stop_sources
from export.gguf_tokenizer import gguf_tokenizer
from export.quiet import quiet_tools
from export.tokenizer_check import check_tokens
from protocol.errors import ModelError

_DESCRIPTION_FILES = ["README.md", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]


def model_folder(name: str, scratch: Path, *, weights: bool = True) -> Path:
    """Return the model folder of model ``name``.

    Args:
        name: a model folder, a hub name or a ``.gguf`` file.
        scratch: an empty folder; a GGUF file is unpacked into it.
        weights: if False, only the configuration and tokenizer are read.

    Raises:
        ModelError: the model does not exist or cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name!r} is not a model folder: it contains no config.json")
        _check_weights(path)
        return path
    if path.suffix == ".gguf":
        return unpack_gguf(path, scratch, weights=weights)
    if path.exists():
        raise ModelError(f"{name!r} is not a model; allowed: a model folder, a hub name or a .gguf file")
    return _download(name, weights=weights)


def unpack_gguf(path: Path, folder: Path, *, weights: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """Convert a GGUF file to a model folder in the empty folder ``folder``, with weights of ``dtype``.

    Raises:
        ModelError: the file is missing, damaged, of an unsupported architecture, or has scaled position embeddings.
        QualityError: a control or user-defined token does not encode to its id.
    """
    if not path.is_file():
        raise ModelError(f"{str(path)!r} does not exist; allowed: a model folder, a hub name or a .gguf file")
    with _reading(repr(str(path))):
        vocabulary = GgufVocabulary.read(path)
        refuse_gguf_rope(path)
        tokenizer = gguf_tokenizer(vocabulary)
        check_tokens(tokenizer.backend_tokenizer, vocabulary.added_tokens)
        tokenizer.save_pretrained(folder)
        if weights:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
            _save(folder, model.config, model, vocabulary)
        else:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            _save(folder, config, config, vocabulary)
    return folder


def parameter_count(folder: Path) -> int:
    """The parameters in the safetensors files of a model folder."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with _reading(repr(str(path))), safe_open(path, framework="np") as weights:
            count += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 - no mapping
    return count


def load_config(folder: Path) -> PretrainedConfig:
    """Load the configuration of a model folder.

    Raises:
        ModelError: it cannot be read.
    """
    with _reading(f"the configuration of {str(folder)!r}"):
        return AutoConfig.from_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model folder; only a fast one has a ``tokenizer.json``.

    Raises:
        ModelError: there is no tokenizer, or only a slow one.
    """
    with _reading(f"the tokenizer of {str(folder)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ModelError(f"{str(folder)!r} has no fast tokenizer (tokenizer.json), which the device needs")
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Load the model of a model folder on the CPU, in evaluation mode; with ``dtype`` "auto" in its own data type.

    Raises:
        ModelError: it cannot be read.
    """
    with _reading(f"the model {str(folder)!r}"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def stop_sources_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> StopSources:
    """Return the stop ids by the source that names them.

    Raises:
        ModelError: the configuration or the generation settings cannot be read.
    """
    settings = {"config.json": load_config(folder).get_text_config().eos_token_id}
    if (folder / "generation_config.json").is_file():
        with _reading(f"the generation settings of {str(folder)!r}"):
            settings["generation_config.json"] = GenerationConfig.from_pretrained(folder).eos_token_id
    settings["tokenizer"] = tokenizer.eos_token_id
    added = {entry.content: token_id for token_id, entry in tokenizer.added_tokens_decoder.items()}
    return stop_sources(settings, added, default_template(tokenizer.chat_template), special_tokens_of(tokenizer))


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The variables that a chat template may name."""
    return {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def _save(
    folder: Path, config: PretrainedConfig, content: PreTrainedModel | PretrainedConfig, vocabulary: GgufVocabulary
) -> None:
    # The name in a GGUF file ("Smollm2 135M 8k Lc100K Mix1 Ep2") is not a hub name.
    vars(config).pop("_model_name_or_path", None)
    ids = vocabulary.special_ids
    for role in ("bos", "eos", "pad"):  # an architecture's defaults are the ids of another vocabulary
        setattr(config, f"{role}_token_id", ids.get(role))
    content.save_pretrained(folder)
    settings = GenerationConfig.from_model_config(config)
    stops = sorted({ids[role] for role in GGUF_STOP_ROLES if role in ids})
    settings.eos_token_id = stops if len(stops) > 1 else ids.get("eos")
    settings.save_pretrained(folder)


def _check_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with _reading(repr(str(path))), safe_open(path, framework="np"):
            pass  # opening a truncated file raises: the header does not match the file size


def _download(name: str, *, weights: bool) -> Path:
    with quiet_tools():
        return hub_folder(name, _DESCRIPTION_FILES + (_WEIGHT_FILES if weights else []))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        with quiet_tools():
            yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, ImportError,
    ) as error:  # fmt: skip
        raise ModelError(f"cannot read {what}: {first_line(error)}") from error
