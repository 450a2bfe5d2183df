"""The drafting loops: every case has its row, whether or not its library is installed, and decodes the same tokens."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from bench.cli import app
from bench.draft import loops
from bench.draft.bandwidth import weight_bytes
from bench.draft.draft import FIGURES
from bench.draft.loops import LOOPS, LlamaCppLoop, engine_times, obstacle
from bench.draft.models import Models
from export.convert import convert
from tests.tiny_source import FP32_GENAI, save_model

TOKENS = 258
"""Of ``save_model``'s tokenizer."""


def tiny_model(folder: Path) -> Path:
    """A model whose logits without a token, which only edgedraft ignores, are never the largest."""
    model = LlamaForCausalLM.from_pretrained(save_model(folder))
    model.get_input_embeddings().weight.data[TOKENS:] = 0
    model.save_pretrained(folder)
    return folder


def figures_of_rows(file: Path) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


def test_every_case_decodes_the_same_tokens_and_a_missing_library_keeps_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bundle, file = tiny_model(tmp_path / "tiny-0.1B"), tmp_path / "bundle", tmp_path / "draft.json"
    convert(str(source), bundle, FP32_GENAI, Console(file=io.StringIO()))
    monkeypatch.setitem(LOOPS, "llama-cpp-python", ("no_module_of_this_name", LlamaCppLoop))
    options = ["--bundle", str(bundle), "--target", str(source), "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(app, ["draft", *options, "--count", "2", "--tokens", "12"])
    assert result.exit_code == 0, result.output
    rows = figures_of_rows(file)
    assert list(rows) == ["edgedraft", "onnxruntime-genai", "optimum", "llama-cpp-python"]
    missing = rows.pop("llama-cpp-python")
    assert missing["missing"] == "not installed"
    assert {missing[name] for name in (*FIGURES, "peak_memory_bytes")} == {None}
    assert [row["same_answers"] for row in rows.values()] == [2, 2, 2]
    assert all(row["missing"] is None and row["milliseconds"] > 0 for row in rows.values())
    assert rows["edgedraft"]["edgedraft_speedup"] == 1
    assert 0 < rows["edgedraft"]["numpy_share"] < 1
    assert not list(tmp_path.glob("tmp*"))


def test_llama_cpp_needs_a_gguf_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "find_spec", lambda _: object())
    assert obstacle("llama-cpp-python", "folder") == "needs --target FILE.gguf"
    assert obstacle("llama-cpp-python", "model.gguf") is None


def test_llama_cpp_decodes_the_first_token_and_as_many_more_as_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Llama:
        def __init__(self, path: str, **options: int) -> None:
            assert (path, options["n_threads"]) == ("model.gguf", 2)

        def generate(self, prompt: list[int], top_k: int, temp: float) -> Iterator[int]:
            assert (top_k, temp) == (1, 0.0)
            yield from range(prompt[-1] + 1, 1000)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    decoded = LlamaCppLoop(Models(tmp_path, tmp_path, "model.gguf"), 2).decode([5, 6], 3)
    assert decoded.token_ids == [7, 8, 9, 10]


def test_a_token_reads_all_weights_but_the_embedding(tmp_path: Path) -> None:
    weights = [
        numpy_helper.from_array(np.zeros((100, 4), np.float32), "embedding"),
        numpy_helper.from_array(np.zeros((4, 6), np.float32), "hidden"),
        numpy_helper.from_array(np.zeros(6, np.uint8), "zero_points"),
    ]
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "hidden"], ["product"]),
        helper.make_node("Sub", ["product", "zero_points"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 6])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [ids], [logits], weights)), tmp_path / "model.onnx")
    assert weight_bytes(tmp_path / "model.onnx") == 4 * 6 * 4 + 6


def test_engine_times_leave_onnx_runtime_as_it_was() -> None:
    session = onnxruntime.InferenceSession
    before = session.run, session.run_with_iobinding
    with pytest.raises(ZeroDivisionError), engine_times():
        raise ZeroDivisionError
    assert (session.run, session.run_with_iobinding) == before
