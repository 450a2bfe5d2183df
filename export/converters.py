"""The converters: from a model folder to an ONNX graph: of float32, for a GPU of float16.

Knows how to call each converter and which errors it raises. Does not know what
happens to the graph afterwards.
"""

from enum import StrEnum
from pathlib import Path

from common.error_text import first_line
from export.quiet import quiet_tools
from protocol.errors import ModelError


class Converter(StrEnum):
    """The tool that converts the model to ONNX."""

    AUTO = "auto"
    """``genai`` if it supports the architecture, else ``optimum``."""
    GENAI = "genai"
    """onnxruntime-genai's model builder: GroupQueryAttention, a shared KV cache buffer."""
    OPTIMUM = "optimum"
    """optimum: more architectures, standard operators, a growing KV cache."""


class Processor(StrEnum):
    """What the graph is for."""

    CPU = "cpu"
    CUDA = "cuda"


_GENAI_PRECISIONS = {Processor.CPU: "fp32", Processor.CUDA: "fp16"}


def convert_to_onnx(
    source: Path, folder: Path, converter: Converter, processor: Processor = Processor.CPU
) -> Converter:
    """Convert the model folder ``source`` to ``folder/model.onnx`` and return the converter used.

    Raises:
        ModelError: the converter does not support the architecture, or fails.
    """
    if converter is Converter.OPTIMUM:
        return _with_optimum(source, folder)
    try:
        return _with_genai(source, folder, processor)
    except NotImplementedError as error:
        if processor is Processor.CUDA:
            raise ModelError(
                f"converter 'genai' does not support the architecture of {str(source)!r}, and optimum writes no graph "
                "for cuda; use --for cpu"
            ) from error
        if converter is Converter.AUTO:
            return _with_optimum(source, folder)
        raise ModelError(
            f"converter 'genai' does not support the architecture of {str(source)!r}; try --converter optimum"
        ) from error


def _with_genai(source: Path, folder: Path, processor: Processor) -> Converter:
    try:
        with quiet_tools():
            # Imported late: it takes seconds and imports torch.
            from onnxruntime_genai.models.builder import create_model

            create_model(
                str(source), str(source), str(folder), _GENAI_PRECISIONS[processor], processor.value,
                str(folder / "cache"), hf_remote=False,
            )  # fmt: skip
    except NotImplementedError:
        raise  # an unsupported architecture: the caller may try optimum
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _failure(Converter.GENAI, source, error) from error
    return Converter.GENAI


def _with_optimum(source: Path, folder: Path) -> Converter:
    try:
        with quiet_tools():
            from optimum.exporters.onnx import main_export

            main_export(
                str(source), folder, task="text-generation-with-past", dtype="fp32",
                do_validation=False, library_name="transformers",
            )  # fmt: skip
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _failure(Converter.OPTIMUM, source, error) from error
    return Converter.OPTIMUM


def _failure(converter: Converter, source: Path, error: Exception) -> ModelError:
    reason = first_line(error)
    others = ", ".join(other for other in (Converter.GENAI, Converter.OPTIMUM) if other is not converter)
    return ModelError(f"converter {converter.value!r} failed on {str(source)!r} ({reason}); try --converter {others}")
