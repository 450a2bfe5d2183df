"""The tools that turn a model folder into a float32 ONNX graph.

Knows how each tool is called and what it cannot do. Does not know what is done
to the graph afterwards.
"""

from enum import StrEnum
from pathlib import Path

from export.quiet import quiet_tools
from protocol.errors import ModelError


class Converter(StrEnum):
    """Which tool makes the graph."""

    AUTO = "auto"
    """``genai`` where it knows the architecture, else ``optimum``."""
    GENAI = "genai"
    """onnxruntime-genai's model builder: GroupQueryAttention, a shared cache."""
    OPTIMUM = "optimum"
    """Any architecture of optimum: plain operators, a growing cache."""


def convert_to_onnx(source: Path, folder: Path, converter: Converter) -> Converter:
    """Write ``folder/model.onnx`` of the model folder ``source``; the tool that did it.

    Raises:
        ModelError: the tool does not know the architecture, or fails at it.
    """
    if converter is Converter.OPTIMUM:
        return _with_optimum(source, folder)
    try:
        return _with_genai(source, folder)
    except NotImplementedError as error:
        if converter is Converter.AUTO:
            return _with_optimum(source, folder)
        raise ModelError(
            f"converter 'genai' does not know the architecture of {str(source)!r}; try --converter optimum"
        ) from error


def _with_genai(source: Path, folder: Path) -> Converter:
    try:
        with quiet_tools():
            # Imported late: it takes seconds, and pulls in all of torch.
            from onnxruntime_genai.models.builder import create_model

            create_model(
                str(source), str(source), str(folder), "fp32", "cpu", str(folder / "cache"),
                hf_remote=False,
            )  # fmt: skip
    except NotImplementedError:
        raise  # said before anything is read, so another tool may try
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
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    others = ", ".join(other for other in (Converter.GENAI, Converter.OPTIMUM) if other is not converter)
    return ModelError(f"converter {converter.value!r} fails at {str(source)!r} ({reason}); try --converter {others}")
