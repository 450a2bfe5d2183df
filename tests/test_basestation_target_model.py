"""Packed batches of every supported architecture against its own forward pass; padding and the context."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from basestation.kv_cache.kv_pool import SequenceKVCache
from basestation.target import pretrained
from basestation.target.pretrained import register_attention
from basestation.target.segment import Segment
from basestation.target.supported_models import ROPE_TYPES, SUPPORTED
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from protocol.errors import SettingsError
from tests.fakes import token_names
from tests.tiny_target import CPU, NO_WINDOWS, VOCAB, WINDOW, WINDOWS, ids, tiny_config, tiny_pair, with_rope

ROPE_TYPES_OF = {"phi3": ("default",), "olmo2": ("default", "linear")}
"""What configurations of transformers allow; all types for other architectures."""
ROPE_CASES = [
    (architecture, kind) for architecture in SUPPORTED for kind in ROPE_TYPES_OF.get(architecture, ROPE_TYPES)
]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((one, {}) for one in SUPPORTED), *WINDOWS.items()],
    ids=[*SUPPORTED, *(f"{one}-window" for one in WINDOWS)],
)
def test_packed_batches_agree_with_the_architectures_own_pass(architecture: str, changes: dict[str, Any]) -> None:
    """Three sequences of different lengths, prefilled in chunks, then rolled back."""
    plain, target = tiny_pair(architecture, **changes)
    texts = [ids(length, seed) for seed, length in enumerate((40, 23, 9))]
    kv_caches = [target.new_kv_cache() for _ in texts]
    for start in range(0, 40, 7):
        target.forward(
            [
                Segment(kv_cache, text[start : start + 7], 0)
                for kv_cache, text in zip(kv_caches, texts, strict=True)
                if text[start : start + 7]
            ]
        )
    for kv_cache, text in zip(kv_caches, texts, strict=True):
        kv_cache.rollback(len(text) - 5)
    segments = [Segment(kv_cache, text[-5:], 5) for kv_cache, text in zip(kv_caches, texts, strict=True)]
    logits = torch.split(target.forward(segments), 5)
    for text, rows in zip(texts, logits, strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([text]), use_cache=False).logits[0, -5:]
        assert torch.allclose(rows, expected, atol=2e-4, rtol=1e-4), float((rows - expected).abs().max())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((one, {}) for one in SUPPORTED), *WINDOWS.items()],
    ids=[*SUPPORTED, *(f"{one}-window" for one in WINDOWS)],
)
def test_batches_with_a_shared_prefix_agree_with_the_architectures_own_pass(
    architecture: str, changes: dict[str, Any]
) -> None:
    """Three sequences share one or two pages, are prefilled in two passes and rolled back."""
    plain, target = tiny_pair(architecture, **changes)
    page_size = target.kv_pool.page_size
    prefix = ids(2 * page_size, 9)
    texts = [[*prefix, *ids(length, seed)] for seed, length in enumerate((40, 6, 23))]
    kv_caches = [target.new_kv_cache() for _ in texts]
    target.forward([Segment(kv_caches[0], prefix, 0)])
    for kv_cache, length in zip(kv_caches[1:], (2 * page_size, page_size), strict=True):
        kv_cache.share_prefix(kv_caches[0], length)
    assert target.kv_pool.shared == 3 * page_size
    for end in (2 * page_size + 3, len(texts[0])):
        target.forward(
            [
                Segment(kv_cache, text[kv_cache.length : end], 0)
                for kv_cache, text in zip(kv_caches, texts, strict=True)
                if text[kv_cache.length : end]
            ]
        )
    for kv_cache, text in zip(kv_caches, texts, strict=True):
        kv_cache.rollback(len(text) - 5)
    segments = [Segment(kv_cache, text[-5:], 5) for kv_cache, text in zip(kv_caches, texts, strict=True)]
    logits = torch.split(target.forward(segments), 5)
    for text, rows in zip(texts, logits, strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([text]), use_cache=False).logits[0, -5:]
        assert torch.allclose(rows, expected, atol=2e-4, rtol=1e-4), float((rows - expected).abs().max())


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["", "window"])
def test_prefix_sharing_changes_no_bit(new: int, window: int | None) -> None:
    """One sequence shares nothing, one is the source, one the borrower; all are prefilled in the same chunks."""
    _, target = tiny_pair("mistral", hidden_size=192, num_attention_heads=6, head_dim=64, sliding_window=window)
    shared = 2 * target.kv_pool.page_size
    text = ids(shared + 77, 0)

    def run(kv_cache: SequenceKVCache, start: int, end: int) -> torch.Tensor:
        return target.forward([Segment(kv_cache, text[start:end], min(new, end - start))])

    alone, source, borrower = (target.new_kv_cache() for _ in range(3))
    for kv_cache in (alone, source):
        run(kv_cache, 0, shared)
        run(kv_cache, shared, len(text) - new)
    borrower.share_prefix(source, shared)
    run(borrower, shared, len(text) - new)
    expected, *others = (run(kv_cache, len(text) - new, len(text)) for kv_cache in (alone, source, borrower))
    for logits in others:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("window", [None, WINDOW, 300], ids=["", "window", "long window"])
def test_scattered_pages_change_no_bit(new: int, window: int | None) -> None:
    """One sequence has its pages in one run; the other gets those between the pages of its neighbours."""
    _, target = tiny_pair("mistral", hidden_size=192, num_attention_heads=6, head_dim=64, sliding_window=window)
    page_size = target.kv_pool.page_size
    text = ids(3 * page_size + 77, 0)
    ends = (100, 2 * page_size, len(text) - new, len(text))

    def run(kv_cache: SequenceKVCache) -> torch.Tensor:
        for start, end in pairwise((0, *ends)):
            logits = target.forward([Segment(kv_cache, text[start:end], min(new, end - start))])
        return logits

    expected = run(target.new_kv_cache())
    assert target.gathered == 0
    neighbours = [target.new_kv_cache() for _ in range(target.kv_pool.free // page_size)]
    for neighbour in neighbours:
        neighbour.reserve(1)
    for neighbour in sorted(neighbours, key=lambda one: one.pages)[::2]:
        neighbour.release()
    assert torch.equal(run(target.new_kv_cache()), expected)
    assert target.gathered > 0


def test_pages_that_no_position_sees_are_given_back() -> None:
    """A rollback to a position that would see them starts again."""
    plain, target = tiny_pair("mistral", sliding_window=WINDOW)
    page_size, kv_cache = target.kv_pool.page_size, target.new_kv_cache()
    text = ids(3 * page_size + 40, 0)
    with torch.inference_mode():
        expected = plain(torch.tensor([text]), use_cache=False).logits[0, -1:]
    for _ in range(2):
        for start in range(0, len(text), 50):
            logits = target.forward([Segment(kv_cache, text[start : start + 50], 1)])
            assert target.kv_pool.used <= 2 * page_size
        assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-4)
        kv_cache.rollback(len(text) - 30)
        assert kv_cache.length == len(text) - 30
        kv_cache.rollback(page_size)
        assert (kv_cache.length, target.kv_pool.used) == (0, 0)


@pytest.mark.parametrize("architecture", WINDOWS)
def test_a_sliding_window_changes_the_logits(architecture: str) -> None:
    """Otherwise the tests with windows would show nothing."""
    text = ids(40, 0)
    targets = [tiny_pair(architecture, **changes)[1] for changes in (NO_WINDOWS[architecture], WINDOWS[architecture])]
    full, windowed = (target.forward([Segment(target.new_kv_cache(), text, 1)]) for target in targets)
    assert not torch.allclose(full, windowed, atol=1e-2)


@pytest.mark.parametrize(("architecture", "kind"), ROPE_CASES)
def test_a_long_neighbour_changes_no_session(architecture: str, kind: str) -> None:
    """A short session, and one that crosses the original context of 64 tokens, against the model's own ``generate``."""
    plain, target = tiny_pair(architecture, **with_rope(architecture, kind))
    neighbour, short, prompt = target.new_kv_cache(), ids(20, 1), ids(58, 2)
    target.forward([Segment(neighbour, ids(200, 3), 0)])
    beside = target.forward([Segment(target.new_kv_cache(), short, len(short)), Segment(neighbour, [5], 0)])
    tokens, kv_cache, rows = list(prompt), target.new_kv_cache(), list[torch.Tensor]()
    while len(tokens) < 70:
        rows.append(target.forward([Segment(neighbour, [5], 0), Segment(kv_cache, tokens[kv_cache.length :], 1)]))
        tokens.append(int(rows[-1].argmax()))
    prompt_ids = torch.tensor([prompt])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    generated = plain.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), **settings)
    assert tokens == generated[0].tolist()
    for logits, text in ((beside, short), (torch.cat(rows), tokens[:-1])):
        with torch.inference_mode():
            expected = plain(torch.tensor([text]), use_cache=False).logits[0, -len(logits) :]
        assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-4), float((logits - expected).abs().max())


@pytest.mark.parametrize("kind", [kind for kind in ROPE_TYPES if kind != "default"])
def test_a_rope_type_changes_the_logits(kind: str) -> None:
    """Otherwise the tests of rope types would show nothing."""
    default, scaled = (tiny_pair("llama", **with_rope("llama", one))[1] for one in ("default", kind))
    text = ids(70, 0)
    one, other = (target.forward([Segment(target.new_kv_cache(), text, 1)]) for target in (default, scaled))
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize(("placement", "device_map"), [("cuda", {"": "cuda"}), ("cpu", None)])
def test_weights_go_straight_to_a_gpu(
    placement: str, device_map: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda source, **options: given.update(options))
    pretrained._load(str(tmp_path), torch.bfloat16, torch.device(placement))
    assert given.get("device_map") == device_map


def test_attention_on_cuda_does_without_cudnn() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    register_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


def test_row_counts_are_padded_to_a_few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    with CPU:  # only there are they padded
        _, target = tiny_pair("llama")
    kv_cache, text, seen = target.new_kv_cache(), ids(300, 1), list[tuple[int, int]]()
    model = vars(target)["_runner"]._model
    run = model.forward

    def recording_forward(input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **others: Any) -> Any:
        seen.append((input_ids.shape[1], len(logits_to_keep)))
        return run(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)

    monkeypatch.setattr(model, "forward", recording_forward)
    full = target.forward([Segment(kv_cache, text, len(text))])
    for length in range(1, len(text) + 1):
        kv_cache.rollback(0)
        logits = target.forward([Segment(kv_cache, text[:length], length)])
        assert kv_cache.length == length
        assert torch.allclose(logits, full[:length], atol=2e-4, rtol=1e-4)
        assert seen[-1] == (seen[-1][0], seen[-1][0])
        assert 0 <= seen[-1][0] - length < max(8, length / 16)
    lengths = {rows for rows, _ in seen}
    assert set(range(1, 33)) < lengths
    assert len(lengths) < 32 + 36


def test_the_context_is_limited_by_the_kv_pool() -> None:
    config = tiny_config("llama")
    with CPU:
        model = AutoModelForCausalLM.from_config(config)
    vocabulary = Vocabulary(token_names(VOCAB), VOCAB, frozenset())
    position = 3 * 2 * 2 * 8 * 4
    assert TargetModel(model, vocabulary, "tiny", 1000 * position).context_length == 512
    assert TargetModel(model, vocabulary, "tiny", 300 * position).context_length == 256
    with pytest.raises(SettingsError, match=r"kv-memory is '37\.5 KiB'; allowed: 48\.0 KiB or more, for 128 tokens"):
        TargetModel(model, vocabulary, "tiny", 100 * position)
