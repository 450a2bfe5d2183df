"""A target with int8 weights: a row's logits depend on its own sequence alone, and it says how far it agrees."""

import logging
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.target import int8_cache
from basestation.target.agreement import PROMPTS, Agreement, Texts, answer_prompts, measure_agreement
from basestation.target.int8_cache import agreement_entry, read_agreement
from basestation.target.int8_conversion import convert, give_int8_weights, uses_int8
from basestation.target.int8_linear import Int8Linear, int8_obstacle
from basestation.target.segment import Segment
from basestation.target.supported_models import SUPPORTED
from basestation.target.target_model import TargetModel
from tests.sample import SAMPLE
from tests.tiny_target import CPU, VOCAB, WINDOWS, tiny_config, tiny_pair

pytestmark = pytest.mark.skipif(int8_obstacle(CPU) is not None, reason=str(int8_obstacle(CPU)))
PROMPT = [(7 * i + 3) % VOCAB for i in range(150)]


def model_of(target: TargetModel) -> Any:
    return vars(target)["_runner"]._model


def int8_target(architecture: str, **changes: object) -> TargetModel:
    _, target = tiny_pair(architecture, **changes)
    model = model_of(target).bfloat16()
    convert(model)
    return TargetModel(model, target.vocabulary, architecture, 2**26, independent_rows=True)


def logits_alone(target: TargetModel, tokens: list[int]) -> Tensor:
    """Logits of every token, each in a forward pass of its own."""
    cache = target.new_kv_cache()
    return torch.cat([target.forward([Segment(cache, [token], 1)]) for token in tokens])


def logits_in_chunks(target: TargetModel, tokens: list[int], *sizes: int) -> Tensor:
    cache, found, start = target.new_kv_cache(), [], 0
    for size in sizes:
        found.append(target.forward([Segment(cache, tokens[start : start + size], size)]))
        start += size
    return torch.cat(found)


def logits_among(target: TargetModel, tokens: list[int], neighbours: int) -> Tensor:
    """Logits of every token, five at a time, in passes with sessions of other lengths and other tokens."""
    caches = [target.new_kv_cache() for _ in range(neighbours)]
    own, found = target.new_kv_cache(), []
    for start in range(0, len(tokens), 5):
        part = tokens[start : start + 5]
        others = [Segment(cache, PROMPT[index : index + 1 + index % 7], 1) for index, cache in enumerate(caches)]
        half = len(others) // 2
        logits = target.forward([*others[:half], Segment(own, part, len(part)), *others[half:]])
        found.append(logits[half : half + len(part)])
    return torch.cat(found)


def logits_after_rollbacks(target: TargetModel, tokens: list[int]) -> Tensor:
    """Logits of every token, one to five at a time, each part after three tokens that are rolled back."""
    cache, found = target.new_kv_cache(), []
    sizes = cycle((1, 4, 2, 5))
    while cache.length < len(tokens):
        length = cache.length
        target.forward([Segment(cache, [5, 6, 7], 1)])
        cache.rollback(length)
        part = tokens[length : length + next(sizes)]
        found.append(target.forward([Segment(cache, part, len(part))]))
    return torch.cat(found)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_logits_are_equal_alone_in_chunks_among_neighbours_and_after_rollbacks(architecture: str) -> None:
    target = int8_target(architecture, **WINDOWS.get(architecture, {}))
    alone = logits_alone(target, PROMPT)
    assert torch.isfinite(alone).all()
    assert torch.equal(logits_in_chunks(target, PROMPT, 150), alone)
    assert torch.equal(logits_in_chunks(target, PROMPT, 1, 2, 13, 64, 3, 67), alone)
    assert torch.equal(logits_among(target, PROMPT, 15), alone)
    assert torch.equal(logits_after_rollbacks(target, PROMPT), alone)


def test_logits_are_equal_after_a_shared_prefix() -> None:
    target = int8_target("qwen2")
    alone = logits_alone(target, PROMPT)
    source, cache = target.new_kv_cache(), target.new_kv_cache()
    target.forward([Segment(source, PROMPT, 1)])
    cache.share_prefix(source, PAGE_SIZE)
    rest = PROMPT[PAGE_SIZE:]
    assert torch.equal(target.forward([Segment(cache, rest, len(rest))]), alone[PAGE_SIZE:])
    assert torch.equal(logits_among(target, PROMPT, 3), alone)


@pytest.mark.parametrize("size", [25, 30, 300])
def test_logits_are_equal_on_scattered_pages(size: int) -> None:
    """Parts cross the multiples of 64 up to which keys are read, within a page too."""
    target = int8_target("qwen2")
    text = [*PROMPT, *reversed(PROMPT)]
    alone = logits_in_chunks(target, text, *[5] * 60)
    before = target.gathered
    cache, neighbour = target.new_kv_cache(), target.new_kv_cache()
    cache.reserve(1)
    neighbour.pages = target.kv_pool.take(1, cache.pages[-1])
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    found = [target.forward([Segment(cache, part, len(part))]) for part in parts]
    assert cache.pages[1] != cache.pages[0] + 1
    assert target.gathered > before
    assert torch.equal(torch.cat(found), alone)


def test_keys_and_values_of_a_damaged_sequence_do_not_reach_the_next_user_of_its_page() -> None:
    target = int8_target("qwen2")
    alone = logits_alone(target, PROMPT[:9])
    pages = vars(target)["_runner"]._kv_pages
    for cached in (*pages.keys, *pages.values):
        cached.fill_(torch.nan)
    assert torch.equal(logits_in_chunks(target, PROMPT[:9], 4, 5), alone)


def texts_of(target: TargetModel) -> Texts:
    return answer_prompts(target, [PROMPT[index : index + 9] for index in range(len(PROMPTS))])


def test_a_model_agrees_with_itself_and_less_with_its_int8_weights() -> None:
    _, target = tiny_pair("qwen2")
    texts = texts_of(target)
    itself = measure_agreement(target, texts)
    assert itself.argmax == 1
    assert itself.overlap == pytest.approx(1, abs=0.01)
    assert itself.perplexity == pytest.approx(1, abs=0.01)
    convert(model_of(target))
    other = measure_agreement(target, texts)
    assert 0.5 < other.overlap < itself.overlap
    assert other.perplexity != itself.perplexity


def test_the_rows_of_down_projections_and_of_the_head_are_rotated() -> None:
    layers = model_of(int8_target("qwen2")).named_modules()
    rotated = {name.split(".")[-1]: vars(one)["_rotate"] for name, one in layers if isinstance(one, Int8Linear)}
    assert {name for name, is_rotated in rotated.items() if is_rotated} == {"down_proj", "lm_head"}
    assert {"q_proj", "o_proj", "gate_proj"} <= rotated.keys()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the user's."""
    monkeypatch.setattr(int8_cache, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "edgedraft" / "int8"


def started(*, use_cache: bool = True) -> tuple[TargetModel, Agreement]:
    _, target = tiny_pair("qwen2")
    model = model_of(target)

    def runner(independent_rows: bool) -> TargetModel:
        return TargetModel(model, target.vocabulary, "qwen2", 2**24, independent_rows=independent_rows)

    prompts = [[1, 2, index] for index in range(len(PROMPTS))]
    agreement = give_int8_weights(model, runner, prompts, use_cache)
    return runner(True), agreement


def test_a_second_start_reads_what_the_first_one_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, measured = started()
    monkeypatch.setattr("basestation.target.int8_conversion.answer_prompts", None)
    second, known = started()
    assert known == measured
    assert torch.equal(logits_alone(first, PROMPT[:9]), logits_alone(second, PROMPT[:9]))
    assert len(list(cache.iterdir())) == 1


def test_an_entry_belongs_to_the_weights_and_the_prompts(cache: Path) -> None:
    _, target = tiny_pair("qwen2")
    entry = agreement_entry(model_of(target), [[1]])
    assert entry != agreement_entry(model_of(target), [[2]])
    model_of(target).model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    assert entry != agreement_entry(model_of(target), [[1]])


def test_an_entry_that_cannot_be_looked_at_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        for name in ("stat", "read_text"):
            patched.setattr(Path, name, refuse)
        assert read_agreement(cache / "entry") is None
    assert f"{cache / 'entry'} cannot be read" in caplog.text


def test_a_damaged_entry_is_named_and_measured_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    started()
    (entry,) = cache.iterdir()
    kept = entry.read_text(encoding="utf-8")
    entry.write_text("{}", encoding="utf-8")
    started()
    assert f"{entry} cannot be read" in caplog.text
    assert entry.read_text(encoding="utf-8") == kept


def test_without_the_cache_nothing_is_written(cache: Path) -> None:
    started(use_cache=False)
    assert not cache.exists()


def test_auto_measures_layers_before_the_weights_are_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="basestation"):
        faster = uses_int8(tiny_config("qwen2"), "auto", "auto", CPU)
    assert f"using {'int8' if faster else 'dtype'}" in caplog.text


@pytest.mark.model
def test_the_sample_model_says_that_it_is_int8_and_how_far_it_agrees(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="basestation"):
        target = TargetModel.load(str(SAMPLE), "auto", "cpu", "64MiB", use_cache=False, weights="int8")
    assert target.name == "sample-int8"
    assert "sample-int8 against its original: the same most likely token for" in caplog.text
    assert sum(type(module) is Int8Linear for module in model_of(target).modules()) == 211
    tokens = [(31 * i + 7) % 40_000 for i in range(20)]
    assert torch.equal(logits_in_chunks(target, tokens, 20), logits_among(target, tokens, 15))
