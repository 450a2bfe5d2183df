"""A bundle whose draft model has another vocabulary than the target speaks the target's tokens."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from common import vocabulary_map
from common.token_bytes import TokenBytes
from common.vocabulary_map import VocabularyMap
from device.drafting.load_model import load_model
from device.text.prompt import Prompt
from device.text.tokenizer import ChatMessage, Tokenizer
from export.convert import ConvertSettings, convert
from export.converters import Converter, Processor
from export.graph import Cache
from export.inspection import description, verify
from export.quality import Continuation, TeacherForcing
from export.quantize import Precision
from export.source import load_tokenizer
from export.vocabulary_bridge import BridgedForcing
from export.weight_choice import Conditions
from protocol.bundle import (
    DRAFT_CHAT_TEMPLATE_NAME,
    DRAFT_TOKENIZER_NAME,
    MODEL_NAME,
    VOCABULARY_MAP_NAME,
    FileRecord,
    Manifest,
)
from protocol.errors import BundleError
from protocol.vocabulary import vocabulary_hash
from tests.tiny_source import CHAT_TEMPLATE, FP32_GENAI, save_model, save_tokenizer

CONDITIONS = Conditions(target_ms=100.0, draft_ms={"fp32": 1.0})
HELLO: list[ChatMessage] = [{"role": "user", "content": "Größe 🐑?"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A draft model and a target with another order of tokens, other special ones, and some of its own."""
    folder = tmp_path_factory.mktemp("models")
    draft, target = save_model(folder / "draft"), save_model(folder / "target", eos_token_id=3)
    save_tokenizer(draft, ["<s>", "</s>"], more=["ĠĠ", "th", "aa"])
    save_tokenizer(target, ["<x>", "<y>", "<s>", "<|im_end|>"], eos="<|im_end|>", more=["th", "ĠĠĠ", "ĠĠ"])
    template = folder / "target" / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE + "<y>", encoding="utf-8")
    return draft, target


@pytest.fixture(scope="module")
def printed_bundle(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    draft, target = pair
    bundle, output = tmp_path_factory.mktemp("bundles") / "bridged", io.StringIO()
    settings = replace(FP32_GENAI, target=str(target), conditions=CONDITIONS)
    convert(str(draft), bundle, settings, Console(file=output, width=400))
    return bundle, output.getvalue()


def test_the_session_has_the_targets_tokens_and_the_graph_its_own(
    pair: tuple[Path, Path], printed_bundle: tuple[Path, str]
) -> None:
    manifest, (_, target) = Manifest.read(printed_bundle[0]), pair
    own = manifest.draft_vocabulary
    assert own is not None
    assert manifest.vocabulary_hash == vocabulary_hash(load_tokenizer(target).get_vocab())
    assert (manifest.vocab_size, manifest.stop_ids, manifest.eos_token) == (263, (3,), "<|im_end|>")
    assert (own.target, own.vocab_size, own.bos_token, own.eos_token) == ("target", 261, "<s>", "</s>")
    assert own.common_tokens == 256 + len(["ĠĠ", "th"]) + len(["end of a turn", "<s>"])
    assert 0 < own.coverage <= 1
    assert {DRAFT_TOKENIZER_NAME, DRAFT_CHAT_TEMPLATE_NAME, VOCABULARY_MAP_NAME} <= set(manifest.files)
    assert manifest.target_quality == own.quality != manifest.quality
    assert verify(printed_bundle[0]) == manifest


def test_export_tells_what_differs_and_what_to_expect(printed_bundle: tuple[Path, str]) -> None:
    bundle, printed = printed_bundle
    assert "the vocabularies differ: id 0 is '<s>' in the draft model and '<x>' in the target; 260 of" in printed
    assert "tokens/s, 10.0 of the target alone" in printed
    console = Console(file=io.StringIO(), width=400)
    with console.capture() as captured:
        console.print(description(Manifest.read(bundle), []))
    assert "261 tokens of its own, 260 of which the target has" in captured.get()


def test_a_draft_model_that_does_not_pay_is_warned_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, slow = io.StringIO(), Conditions(target_ms=1.0, draft_ms={"fp32": 500.0})
    settings = replace(FP32_GENAI, target=str(pair[1]), conditions=slow)
    convert(str(pair[0]), tmp_path / "bundle", settings, Console(file=output, width=400))
    assert "warning: with these times the target alone is as fast" in output.getvalue()


@pytest.mark.parametrize("draft_ms", [{}, {"fp16": 2.0}], ids=len)
def test_the_speed_on_a_gpu_is_predicted_from_its_own_time_alone(
    draft_ms: dict[str, float], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    output, conditions = io.StringIO(), Conditions(target_ms=100.0, draft_ms=draft_ms)
    settings = ConvertSettings(Converter.GENAI, Precision.FP16, str(pair[1]), conditions, Processor.CUDA)
    manifest = convert(str(pair[0]), tmp_path / "bundle", settings, Console(file=output, width=400))
    assert [one.draft_milliseconds for one in manifest.candidates] == [*draft_ms.values()]
    assert ("tokens/s" in output.getvalue()) == bool(draft_ms)
    assert ("no speed is predicted for a GPU without --draft-ms" in output.getvalue()) != bool(draft_ms)
    assert manifest.draft_vocabulary is not None
    assert manifest.draft_vocabulary.quality.positions > 0


def test_the_device_computes_what_export_measured(printed_bundle: tuple[Path, str]) -> None:
    bundle, _ = printed_bundle
    model = load_model(bundle, threads=1)
    tokenizer = Tokenizer(bundle, model.manifest)
    prompt = tokenizer.encode_chat(HELLO)
    answer = [*tokenizer.encode("th  🐑\t东"), 260, 261, 262, 3]
    own = model.manifest.draft_vocabulary
    assert own is not None
    vocabulary = VocabularyMap.read(bundle, model.manifest, own)
    cache = Cache.of(onnx.load(bundle / MODEL_NAME, load_external_data=False))
    bridged = BridgedForcing(TeacherForcing(bundle / MODEL_NAME, cache), vocabulary, {tuple(prompt): prompt.draft_ids})
    expected = list(bridged.logits(Continuation(prompt, answer, np.empty(0))))
    model.begin(prompt)
    found = [model.forward(prompt[model.length :]), *(model.forward([token_id]) for token_id in answer[:-1])]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_prompts_are_encoded_by_both_tokenizers_and_templates(printed_bundle: tuple[Path, str]) -> None:
    bundle, _ = printed_bundle
    tokenizer = Tokenizer(bundle, Manifest.read(bundle))
    own = Tokenizer(bundle, Manifest.read(bundle), of_draft_model=True)
    for prompt in (tokenizer.encode_chat(HELLO), tokenizer.encode("Größe 🐑?")):
        assert isinstance(prompt, Prompt)
        assert own.decode(prompt.draft_ids) == tokenizer.decode(prompt).removesuffix("<y>")
        assert prompt.draft_ids != prompt


def test_a_wrong_map_is_refused_at_load_and_by_verify(printed_bundle: tuple[Path, str], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in printed_bundle[0].iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    ids = np.load(bundle / VOCABULARY_MAP_NAME)
    ids[[10, 11]] = ids[[11, 10]]
    np.save(bundle / VOCABULARY_MAP_NAME, ids)
    manifest = Manifest.read(bundle)
    record = FileRecord.of(bundle / VOCABULARY_MAP_NAME)
    replace(manifest, files={**manifest.files, VOCABULARY_MAP_NAME: record}).write(bundle)
    for load in (load_model, verify):
        with pytest.raises(BundleError, match="the vocabulary map gives the target's token 10"):
            load(bundle)


def test_a_wrong_map_is_not_exported(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_bytes = vocabulary_map._by_bytes

    def wrong(tokens: TokenBytes) -> dict[bytes, int]:
        found = by_bytes(tokens)
        return {**found, b"a": found[b"b"], b"b": found[b"a"]}

    monkeypatch.setattr(vocabulary_map, "_by_bytes", wrong)
    with pytest.raises(BundleError, match="the vocabulary map gives the target's token"):
        convert(
            str(pair[0]), tmp_path / "bundle", replace(FP32_GENAI, target=str(pair[1])), Console(file=io.StringIO())
        )
    assert not (tmp_path / "bundle").exists()
