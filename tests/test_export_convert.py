"""Bundles of a tiny random model: a bundle that differs from its source model is not written."""

import io
import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from common.gguf_metadata import gguf_parameters
from device.drafting.draft_model import DraftModel
from export import candidates, graph, quality
from export import convert as convert_module
from export.convert import ConvertSettings, convert
from export.converters import Converter
from export.quantize import FORMATS, Precision, WeightFormat, quantize
from export.source import load_tokenizer, parameter_count, unpack_gguf
from export.source_model import Models, SourceModel
from protocol.bundle import CacheKind, Manifest, QualityFigures
from protocol.errors import MismatchError, ModelError, NonFiniteError, QualityError, SettingsError
from protocol.vocabulary import vocabulary_hash
from tests.gguf_files import tiny_model_file
from tests.screen import CONSOLE
from tests.tiny_source import CHAT_TEMPLATE, FP32_GENAI, save_model, save_tokenizer

FP32_OPTIMUM = ConvertSettings(Converter.OPTIMUM, Precision.FP32)


@pytest.fixture(scope="session")
def source_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-0.1B")


@pytest.fixture(scope="session", params=[FP32_GENAI, FP32_OPTIMUM], ids=["genai", "optimum"])
def fp32_bundle(request: pytest.FixtureRequest, source_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("bundles") / "fp32"
    convert(str(source_model), bundle, request.param, CONSOLE)
    return bundle


def greedy_tokens_of_graph(bundle: Path, prompt_ids: list[int], count: int) -> list[int]:
    """The slow twin: run the whole sequence through the graph for each token."""
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    cache = graph.Cache.of(onnx.load(bundle / "model.onnx", load_external_data=False))
    empty = np.zeros((1, cache.kv_heads, 0, cache.head_size), np.float32)
    ids = list(prompt_ids)
    for _ in range(count):
        feeds = {
            **dict.fromkeys(cache.past_names, empty),
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        known = {entry.name for entry in session.get_inputs()}
        (logits,) = session.run(["logits"], {name: feed for name, feed in feeds.items() if name in known})
        assert logits.shape == (1, 1, 320)
        ids.append(int(logits[0, 0].argmax()))
    return ids[len(prompt_ids) :]


def greedy_tokens_of_pytorch(model: PreTrainedModel, prompt_ids: list[int], count: int) -> list[int]:
    ids = list(prompt_ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_an_fp32_graph_gives_the_source_models_tokens_from_the_last_position_only(
    source_model: Path, fp32_bundle: Path
) -> None:
    prompt_ids = [0, 40, 41, 42, 99, 7]
    expected = greedy_tokens_of_pytorch(LlamaForCausalLM.from_pretrained(source_model), prompt_ids, 12)
    assert len(set(expected)) > 2
    assert greedy_tokens_of_graph(fp32_bundle, prompt_ids, 12) == expected


def test_a_fork_continues_apart_from_the_model_it_was_forked_from(fp32_bundle: Path) -> None:
    model, slow = DraftModel(fp32_bundle), DraftModel(fp32_bundle)
    prompt, one, other = [*range(40, 60)], [99, 7, 70], [8, 200]
    model.forward(prompt)
    fork = model.fork(12)
    model.rollback(10)
    answers = [model.forward(one), fork.forward(other)]
    for tokens, answer in zip(([*prompt[:10], *one], [*prompt[:12], *other]), answers, strict=True):
        slow.rollback(0)
        np.testing.assert_allclose(answer, slow.forward(tokens), atol=1e-5)
    assert (model.token_ids, fork.token_ids) == ([*prompt[:10], *one], [*prompt[:12], *other])


def test_reused_buffers_give_the_logits_of_a_new_model_after_any_rollbacks_and_forks(fp32_bundle: Path) -> None:
    rng, branches, earlier = np.random.default_rng(3), [DraftModel(fp32_bundle)], []
    for _ in range(40):
        model = branches[rng.integers(len(branches))]
        if rng.random() < 0.2:
            branches.append(model.fork(int(rng.integers(model.length + 1))))
        elif rng.random() < 0.4:
            model.rollback(int(rng.integers(model.length + 1)))
        else:
            logits = model.forward(rng.integers(0, 258, rng.choice([1, 1, 1, 3, 70])).tolist())
            slow = DraftModel(fp32_bundle).forward(model.token_ids)
            np.testing.assert_allclose(logits, slow, atol=1e-4)
            earlier.append((logits, logits.copy()))
    assert len(branches) > 4
    assert all(np.array_equal(logits, copied) for logits, copied in earlier)


def test_a_token_allocates_no_more_python_memory_in_a_longer_context(fp32_bundle: Path) -> None:
    model = DraftModel(fp32_bundle)

    def allocated_by_a_token(length: int) -> int:
        """The smallest of a few tokens: the list of token ids grows now and then."""
        model.forward([7] * (length - model.length))
        peaks = []
        for _ in range(5):
            tracemalloc.start()
            model.forward([7])
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return min(peaks)

    first = allocated_by_a_token(10)
    assert allocated_by_a_token(480) <= first + 1024


def test_the_manifest_describes_the_bundle(fp32_bundle: Path) -> None:
    manifest = Manifest.read(fp32_bundle)
    manifest.check_files(fp32_bundle)
    kinds = {"genai": CacheKind.SHARED, "optimum": CacheKind.GROWING}
    assert manifest.cache_kind is kinds[manifest.converter]
    assert (manifest.name, manifest.precision, manifest.context_length) == ("tiny-0.1B", "fp32", 512)
    assert (manifest.layers, manifest.kv_heads, manifest.head_size) == (2, 2, 16)
    assert (manifest.vocab_size, manifest.stop_ids) == (258, (1,))
    assert (manifest.bos_token, manifest.eos_token) == ("<s>", "</s>")
    assert manifest.quality.positions == quality.NEW_TOKENS * len(quality.PROMPTS)
    assert {path.name for path in fp32_bundle.iterdir()} == {*manifest.files, "manifest.json"}
    assert (fp32_bundle / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_an_int8_bundle_passes_the_quality_check_and_has_no_float_matrix(source_model: Path, tmp_path: Path) -> None:
    manifest = convert(str(source_model), tmp_path / "bundle", ConvertSettings(precision=Precision.INT8), CONSOLE)
    assert manifest.precision == "int8"
    weights = onnx.load(tmp_path / "bundle" / "model.onnx").graph.initializer
    floats = [weight for weight in weights if weight.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(weight.dims) for weight in floats) <= 512 * 8  # the rotary embedding's cosines


def test_int4_keeps_the_embedding_and_the_head_at_8_bits(fp32_bundle: Path) -> None:
    model = quantize(graph.load(fp32_bundle / "model.onnx"), FORMATS[Precision.INT4])
    bits = {
        (node.op_type, onnx.helper.get_node_attr_value(node, "bits"), "logits" in node.output)
        for node in model.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    }
    assert bits == {("MatMulNBits", 4, False), ("MatMulNBits", 8, True), ("GatherBlockQuantized", 8, False)}


def test_auto_falls_back_to_optimum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="--converter optimum"):
        convert(str(tmp_path / "gpt2"), tmp_path / "bundle", FP32_GENAI, CONSOLE)
    auto = ConvertSettings(Converter.AUTO, Precision.FP32)
    assert convert(str(tmp_path / "gpt2"), tmp_path / "bundle", auto, CONSOLE).converter == "optimum"


def refused(
    error: type[Exception], match: str, model: Path, folder: Path, settings: ConvertSettings = FP32_GENAI
) -> None:
    """Assert that converting raises ``error`` and leaves ``folder`` unchanged."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=match):
        convert(str(model), folder / "bundle", settings, CONSOLE)
    assert sorted(folder.rglob("*")) == before


def test_an_error_names_the_unusable_model(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(ModelError, "does not exist", tmp_path / "none.gguf", folder)
    refused(ModelError, "contains no config.json", folder, folder)
    truncated = save_model(tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(ModelError, "model.safetensors", truncated, folder)
    no_tokenizer = save_model(tmp_path / "no_tokenizer")
    for path in no_tokenizer.glob("*token*"):
        path.unlink()
    refused(ModelError, "the tokenizer of .*no_tokenizer", no_tokenizer, folder)


def test_too_little_memory_or_disk_is_refused_before_conversion(
    source_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(convert_module, "convert_to_onnx")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(ModelError, "GB of disk are needed", source_model, tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    refused(ModelError, "GB of memory are needed", source_model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (FP32_GENAI, "GB of disk are needed"),
        (replace(FP32_GENAI, target="none.gguf"), "none.gguf.* does not exist"),
    ],
    ids=["disk", "target"],
)
def test_what_refuses_a_gguf_file_is_checked_before_it_is_unpacked(
    settings: ConvertSettings, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("export.source.AutoModelForCausalLM")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(ModelError, match, tiny_model_file(tmp_path / "tiny.gguf"), folder, settings)


def test_the_parameters_of_a_gguf_file_are_those_of_the_model_that_it_is_unpacked_to(tmp_path: Path) -> None:
    file = tiny_model_file(tmp_path / "tiny.gguf")
    assert gguf_parameters(file) == parameter_count(unpack_gguf(file, tmp_path / "model"))


def test_a_folder_with_other_content_is_not_replaced(source_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").touch()
    refused(SettingsError, "BUNDLE", source_model, tmp_path)
    for manifest in ('{"name": "a web page", "icons": []}', "[]", "no JSON"):
        (tmp_path / "bundle" / "manifest.json").write_text(manifest, encoding="utf-8")
        refused(SettingsError, "BUNDLE", source_model, tmp_path)


def test_a_target_whose_tokens_cannot_be_spelled_is_refused_before_conversion(
    source_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(convert_module, "convert_to_onnx")
    folder = tmp_path / "folder"
    folder.mkdir()
    draft = save_model(tmp_path / "few-bytes")
    content = json.loads((draft / "tokenizer.json").read_text(encoding="utf-8"))
    del content["model"]["vocab"]["A"]
    (draft / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    match = "the draft model has no token for the byte 0x41"
    refused(MismatchError, match, draft, folder, replace(FP32_GENAI, target=str(source_model)))


def test_a_chatml_draft_with_more_tokens_and_other_stop_ids_than_its_target_is_cut_to_the_target(
    tmp_path: Path,
) -> None:
    draft = save_model(tmp_path / "draft", eos_token_id=0)
    save_tokenizer(draft, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", more=["<extra>", "<more>"])
    target = save_model(tmp_path / "target", eos_token_id=[1, 0])
    save_tokenizer(target, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], more=["[PAD260]", "[PAD261]", "[PAD262]"])
    output = io.StringIO()
    manifest = convert(
        str(draft), tmp_path / "bundle", replace(FP32_GENAI, target=str(target)), Console(file=output, width=200)
    )
    assert manifest.vocab_size == 260
    first = {token: token_id for token, token_id in load_tokenizer(draft).get_vocab().items() if token_id < 260}
    assert manifest.vocabulary_hash == vocabulary_hash(first) == vocabulary_hash(load_tokenizer(target).get_vocab())
    assert manifest.stop_ids == (0, 3)
    printed = output.getvalue()
    assert (
        "stop ids: 0 <s>, 3 <|im_end|> "
        "(config.json: [0]; generation_config.json: [0]; tokenizer: [3]; chat template: [3])" in printed
    )
    assert "warning: the sources of stop ids disagree; an answer ends at any of them" in printed


@pytest.mark.parametrize(
    ("draft_tokens", "target_tokens"),
    [(["[PAD258]", "[PAD259]"], []), ([], ["[PAD258]"]), (["[PAD258]"], ["ab", "ba"]), (["ab"], ["ab", "ba"])],
    ids=repr,
)
def test_one_family_whose_vocabularies_are_padded_differently_is_accepted(
    draft_tokens: list[str], target_tokens: list[str], tmp_path: Path
) -> None:
    models = []
    for name, more in (("draft", draft_tokens), ("target", target_tokens)):
        folder = save_model(tmp_path / name)
        save_tokenizer(folder, more=more)
        models.append(SourceModel.read(str(folder), tmp_path))
    assert not Models(*models).are_bridged


def test_of_several_chat_templates_the_default_is_written(tmp_path: Path) -> None:
    model = SourceModel.read(str(save_model(tmp_path / "model")), tmp_path)
    model.tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    prompts = convert_module._write_text_files(tmp_path, model, "tokenizer.json", "chat_template.jinja")
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    assert model.tokenizer.decode(prompts[0]) == f"{quality.PROMPTS[0]}\n"


def test_a_graph_that_fails_the_quality_check_is_not_written(
    source_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(model: onnx.ModelProto, weights: WeightFormat) -> onnx.ModelProto:
        for weight in model.graph.initializer:
            if weight.name.endswith("down_proj.MatMul.weight"):
                noise = np.random.default_rng(0).normal(size=tuple(weight.dims)).astype(np.float32)
                weight.CopyFrom(onnx.numpy_helper.from_array(noise, weight.name))
        return model

    settings = ConvertSettings(Converter.GENAI, Precision.FP32)
    good = convert(str(source_model), tmp_path / "bundle", settings, CONSOLE)
    monkeypatch.setattr(candidates, "quantize", corrupt)
    refused(QualityError, "argmax_agreement .* allowed: 0.99", source_model, tmp_path, settings)
    assert Manifest.read(tmp_path / "bundle") == good
    good.check_files(tmp_path / "bundle")


def test_a_source_whose_logits_are_nan_is_refused(tmp_path: Path) -> None:
    damaged, folder = save_model(tmp_path / "damaged"), tmp_path / "folder"
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(damaged)
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    model.save_pretrained(damaged)
    refused(NonFiniteError, "NaN or infinite: its weights are damaged", damaged, folder)


def test_a_nan_fails_the_quality_check() -> None:
    with pytest.raises(QualityError, match="overlap"):
        quality.check(QualityFigures(1.0, float("nan"), 1.0, 1.0, positions=1), quality.LIMITS[Precision.INT4])


def test_the_quality_check_measures_the_acceptance_of_each_mode() -> None:
    rng = np.random.default_rng(1)
    draft, target = (rng.dirichlet(np.full(100, 0.3)) for _ in range(2))
    kept = np.sort(draft)[-32]
    sent = np.where(draft >= kept, draft, 0) / draft[draft >= kept].sum()
    coupled = [1 / np.maximum(draft / draft[v], target / target[v]).sum() for v in range(100)]  # P(both choose v)
    figures = np.mean([quality._compare(draft, target, position) for position in range(300)], axis=0)
    expected = [
        float(draft.argmax() == target.argmax()),
        np.minimum(draft, target).sum(),
        np.minimum(sent, target).sum(),
    ]
    assert figures[:3].tolist() == pytest.approx(expected)
    assert figures[3] == pytest.approx(sum(coupled), abs=0.02)
    assert np.mean([quality._compare(draft, draft, position) for position in range(9)], axis=0)[[0, 1, 3]].tolist() == (
        pytest.approx([1, 1, 1])
    )


def test_a_graph_that_gives_nan_gets_nan_figures() -> None:
    assert np.isnan(quality._compare(np.full(100, np.nan), np.full(100, 0.01), 0)).all()


def test_a_graph_without_a_recognised_head_gives_only_the_last_position() -> None:
    hidden, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, "tokens", 4])
        for name in ("hidden", "logits")
    )
    relu = onnx.helper.make_node("Relu", ["hidden"], ["logits"])
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([relu], "headless", [hidden], [logits]), opset_imports=[opset], ir_version=10
    )
    graph.keep_last_position(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    states = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    assert np.array_equal(session.run(["logits"], {"hidden": states})[0], states[:, -1:])
