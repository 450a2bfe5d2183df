"""A bundle for a GPU: every node has a kernel there; on a CPU it computes what the source model does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from device.drafting import draft_model
from device.drafting.cuda_provider import check_bundle, check_nodes
from device.drafting.draft_model import DraftModel
from export import graph
from export.cli import app
from export.convert import ConvertSettings, convert
from export.converters import Converter, Processor, convert_to_onnx
from export.cuda_graph import check_kernels, node_types
from export.inspection import verify
from export.quantize import Precision
from protocol.bundle import MODEL_NAME, CacheKind
from protocol.errors import ModelError, SettingsError
from tests.fakes import manifest
from tests.screen import CONSOLE
from tests.tiny_source import save_model

FOR_CUDA = ConvertSettings(Converter.AUTO, Precision.FP16, processor=Processor.CUDA)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PROMPT = [0, 40, 41, 42, 99, 7]


@pytest.fixture(scope="module")
def source_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def bundle(source_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "cuda"
    convert(str(source_model), folder, FOR_CUDA, CONSOLE)
    return folder


def test_attention_and_matrices_are_float16(bundle: Path) -> None:
    model = graph.load(bundle / MODEL_NAME)
    check_kernels(model)
    types = node_types(model)
    assert types["GroupQueryAttention", "float16"] == 2
    assert {dtype for op_type, dtype in types if op_type == "MatMul"} == {"float16"}
    assert {op_type for op_type, dtype in types if dtype == "float32"} == {"Cast"}  # of the logits


def test_the_manifest_says_what_the_kv_cache_holds(bundle: Path) -> None:
    found = verify(bundle)
    assert (found.precision, found.cache_dtype, found.cache_kind) == ("fp16", "float16", CacheKind.SHARED)
    check_bundle(CUDA, found)


def test_on_a_cpu_it_computes_the_source_models_logits(source_model: Path, bundle: Path) -> None:
    model = DraftModel(bundle)
    logits = model.forward(PROMPT)
    assert logits.dtype == np.float32
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(source_model)(torch.tensor([PROMPT])).logits[0, -1, : len(logits)]
    np.testing.assert_allclose(logits, expected, atol=0.02 * float(expected.abs().max()))


def test_rollback_and_fork_keep_the_cache(bundle: Path) -> None:
    model = DraftModel(bundle)
    model.forward([*PROMPT, 8, 200])
    fork = model.fork(len(PROMPT))
    model.rollback(4)
    for one, tokens in ((model, [*PROMPT[:4], 70]), (fork, [*PROMPT, 70])):
        slow = DraftModel(bundle)
        np.testing.assert_allclose(one.forward([70]), slow.forward(tokens), atol=0.05)


def test_a_float32_graph_is_refused_with_its_attention(source_model: Path, tmp_path: Path) -> None:
    convert_to_onnx(source_model, tmp_path, Converter.GENAI)
    with pytest.raises(ModelError, match=r"no kernel for GroupQueryAttention of float32 \(2 nodes\); use --for cpu"):
        check_kernels(graph.load(tmp_path / MODEL_NAME))


def test_a_node_without_a_kernel_is_named() -> None:
    source, result = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [1]) for name in ("source", "result")
    )
    node = onnx.helper.make_node("Erf", ["source"], ["result"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "other", [source], [result]))
    with pytest.raises(ModelError, match=r"no kernel for Erf of float16 \(1 nodes\)"):
        check_kernels(model)


def test_optimum_is_refused_for_a_gpu_before_the_model_is_read() -> None:
    with pytest.raises(SettingsError, match="converter is 'optimum'; allowed: auto or genai with --for cuda"):
        ConvertSettings(Converter.OPTIMUM, Precision.FP16, processor=Processor.CUDA)


def test_an_architecture_that_genai_does_not_know_is_refused_for_a_gpu(
    source_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("export.converters._with_genai", unknown)
    with pytest.raises(ModelError, match="optimum writes no graph for cuda; use --for cpu"):
        convert_to_onnx(source_model, tmp_path, Converter.AUTO, Processor.CUDA)


def test_another_precision_for_a_gpu_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", "model", str(tmp_path), "--for", "cuda", "--precision", "int8"])
    assert str(result.exception) == "precision is 'int8'; allowed: auto with --for cuda, whose weights are float16"


# -- the device --


def loaded_on_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> DraftModel:
    """A model that believes to be on a GPU, with its session on the CPU."""
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(session, "get_providers", lambda _: [CUDA, CPU])
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(
        "onnxruntime.InferenceSession",
        lambda path, options, providers: session(path, options, providers=[CPU]),
    )
    monkeypatch.setattr(draft_model, "check_cuda", lambda _: None)
    return DraftModel(bundle, providers=[CUDA])


def test_nodes_that_run_on_the_cpu_are_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"for GroupQueryAttention \(2 nodes\), .*convert --for cuda"):
        loaded_on_gpu(bundle, monkeypatch)


def test_the_kv_cache_lies_on_the_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[tuple[str, str]] = set()
    create = onnxruntime.OrtValue.ortvalue_from_numpy

    def recorded(array: Any, device: str = "cpu") -> Any:
        made.add((array.dtype.name, device))
        return create(array)

    monkeypatch.setattr(draft_model, "check_nodes", lambda *_: None)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", recorded)
    loaded_on_gpu(bundle, monkeypatch).forward(PROMPT)
    assert made == {("float16", "cuda"), ("float32", "cpu")}  # the logits are read on the host


def test_lengths_may_be_computed_on_the_cpu() -> None:
    def session(*assigned: tuple[str, str]) -> Any:
        parts = [
            SimpleNamespace(ep_name=provider, get_nodes=lambda op_type=op_type: [SimpleNamespace(op_type=op_type)])
            for provider, op_type in assigned
        ]
        return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)

    check_nodes(CUDA, session((CUDA, "MatMul"), (CPU, "ReduceSum"), (CPU, "Cast")))
    with pytest.raises(SettingsError, match=r"no kernel there for MatMul \(1 nodes\)"):
        check_nodes(CUDA, session((CUDA, "GroupQueryAttention"), (CPU, "MatMul")))


def test_an_onnx_runtime_that_cannot_tell_says_so(caplog: pytest.LogCaptureFixture) -> None:
    check_nodes(CUDA, SimpleNamespace())
    assert "cannot tell which nodes run on the CPU" in caplog.text


def test_a_bundle_for_a_cpu_is_refused_on_a_gpu() -> None:
    with pytest.raises(SettingsError, match=r"the bundle is for a CPU: its attention is of float32; .*--for cuda"):
        check_bundle(CUDA, manifest(12))
