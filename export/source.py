"""Source models: from a folder, a hub name or a GGUF file to a model folder.

Knows how transformers reads and writes models. Does not know how a model is
converted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
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

from export.quiet import quiet_tools
from protocol.bundle import stop_ids
from protocol.errors import ModelError

_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]
_SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


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


def unpack_gguf(path: Path, folder: Path, *, weights: bool = True) -> Path:
    """Convert a GGUF file to a float32 model folder in the empty folder ``folder``.

    Raises:
        ModelError: the file is missing, damaged or of an unsupported architecture.
    """
    if not path.is_file():
        raise ModelError(f"{str(path)!r} does not exist; allowed: a model folder, a hub name or a .gguf file")
    with _reading(repr(str(path))):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if weights:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            _save(folder, tokenizer, model.config, model)
        else:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            _save(folder, tokenizer, config, config)
    return folder


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


def load_model(folder: Path) -> PreTrainedModel:
    """Load the model of a model folder in float32 on the CPU, in evaluation mode.

    Raises:
        ModelError: it cannot be read.
    """
    with _reading(f"the model {str(folder)!r}"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stop_ids_of(folder: Path) -> tuple[int, ...]:
    """Return the stop ids from the configuration and the generation settings, sorted."""
    configs = [load_config(folder)]
    if (folder / "generation_config.json").is_file():
        with _reading(f"the generation settings of {str(folder)!r}"):
            configs.append(GenerationConfig.from_pretrained(folder))
    return tuple(sorted(stop_ids(*(config.eos_token_id for config in configs))))


def _save(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    content: PreTrainedModel | PretrainedConfig,
) -> None:
    # The name in a GGUF file ("Smollm2 135M 8k Lc100K Mix1 Ep2") is not a hub name.
    vars(config).pop("_model_name_or_path", None)
    _set_special_tokens(tokenizer, config)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)  # a copy of the GGUF file
    content.save_pretrained(folder)


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    # The special tokens of a GGUF file's tokenizer may differ from those of the model's configuration.
    for name in _SPECIAL_TOKENS:
        token_id = getattr(config, f"{name}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))


def _check_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with _reading(repr(str(path))), safe_open(path, framework="np"):
            pass  # opening a truncated file raises: the header does not match the file size


def _download(name: str, *, weights: bool) -> Path:
    patterns = _DESCRIPTION_FILES + (_WEIGHT_FILES if weights else [])
    try:
        with quiet_tools():
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is not a local folder and cannot be downloaded from the hub ({_first_line(error)}); "
            "allowed: a model folder, a hub name or a .gguf file"
        ) from error


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        with quiet_tools():
            yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, ImportError,
    ) as error:  # fmt: skip
        raise ModelError(f"cannot read {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
