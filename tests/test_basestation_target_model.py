"""Packed batches of every supported architecture against its own forward pass; refusals before loading."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation import memory
from basestation.attention import ATTENTION_NAME
from basestation.kv_pool import BLOCK_SIZE, SequenceKVCache
from basestation.memory import check_fits, kv_budget, parse_size
from basestation.segment import Segment
from basestation.target_model import SUPPORTED, TargetModel, Vocabulary, refuse_unsupported, register_attention
from protocol.errors import ModelError, SettingsError

VOCAB = 97
CPU = torch.device("cpu")
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
NO_WINDOWS = {
    architecture: {**changes, "sliding_window": TINY["max_position_embeddings"]}
    for architecture, changes in WINDOWS.items()
}


def tiny_config(architecture: str, **changes: Any) -> Any:
    return AutoConfig.for_model(architecture, **{**TINY, **changes})


def tiny_pair(architecture: str, **changes: Any) -> tuple[Any, TargetModel]:
    """A model with random weights as transformers runs it, and the same model as a target."""
    register_attention()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), attn_implementation="eager").eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = tiny_config(architecture, **changes)
    packed = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
    packed.load_state_dict(plain.state_dict())
    return plain, TargetModel(packed, Vocabulary(VOCAB, bytes(32), frozenset()), architecture, 2**24)


def ids(length: int, seed: int) -> list[int]:
    token_ids: list[int] = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return token_ids


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
    """Three sequences share one or two blocks, are prefilled in chunks and rolled back."""
    plain, target = tiny_pair(architecture, **changes)
    prefix = ids(2 * BLOCK_SIZE, 9)
    texts = [[*prefix, *ids(length, seed)] for seed, length in enumerate((40, 6, 23))]
    kv_caches = [target.new_kv_cache() for _ in texts]
    for start in range(0, len(texts[0]), 50):
        target.forward([Segment(kv_caches[0], texts[0][start : start + 50], 0)])
    for kv_cache, length in zip(kv_caches[1:], (2 * BLOCK_SIZE, BLOCK_SIZE), strict=True):
        kv_cache.share_prefix(kv_caches[0], length)
    for end in (2 * BLOCK_SIZE + 3, len(texts[0])):
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
    assert target.kv_pool.shared == 3 * BLOCK_SIZE
    for text, rows in zip(texts, logits, strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([text]), use_cache=False).logits[0, -5:]
        assert torch.allclose(rows, expected, atol=2e-4, rtol=1e-4), float((rows - expected).abs().max())


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["", "window"])
def test_prefix_sharing_changes_no_bit(new: int, window: int | None) -> None:
    """One sequence shares nothing, one is the source, one the borrower; all are prefilled in the same chunks."""
    _, target = tiny_pair("mistral", hidden_size=192, num_attention_heads=6, head_dim=64, sliding_window=window)
    text = ids(2 * BLOCK_SIZE + 77, 0)

    def run(kv_cache: SequenceKVCache, start: int, end: int) -> torch.Tensor:
        return target.forward([Segment(kv_cache, text[start:end], min(new, end - start))])

    alone, source, borrower = (target.new_kv_cache() for _ in range(3))
    for kv_cache in (alone, source):
        run(kv_cache, 0, 2 * BLOCK_SIZE)
        run(kv_cache, 2 * BLOCK_SIZE, len(text) - new)
    borrower.share_prefix(source, 2 * BLOCK_SIZE)
    run(borrower, 2 * BLOCK_SIZE, len(text) - new)
    expected, *others = (run(kv_cache, len(text) - new, len(text)) for kv_cache in (alone, source, borrower))
    for logits in others:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("architecture", WINDOWS)
def test_a_sliding_window_changes_the_logits(architecture: str) -> None:
    """Otherwise the tests with windows would show nothing."""
    text = ids(40, 0)
    targets = [tiny_pair(architecture, **changes)[1] for changes in (NO_WINDOWS[architecture], WINDOWS[architecture])]
    full, windowed = (target.forward([Segment(target.new_kv_cache(), text, 1)]) for target in targets)
    assert not torch.allclose(full, windowed, atol=1e-2)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mamba", "t5"])
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"architecture '{architecture}' is not supported; supported: .*llama.*qwen3"):
        refuse_unsupported(AutoConfig.for_model(architecture))


def test_a_target_that_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", hidden_size=1024, num_hidden_layers=16, intermediate_size=4096, vocab_size=32000)
    check_fits(config, torch.float32, CPU)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**20)
    with pytest.raises(
        ModelError, match=r"0\.27 billion parameters in float32 take 1\.0 GiB, and 1\.0 MiB are free on cpu"
    ):
        check_fits(config, torch.float32, CPU)


def test_row_counts_are_padded_to_a_few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    _, target = tiny_pair("llama")
    kv_cache, text, seen = target.new_kv_cache(), ids(300, 1), list[tuple[int, int]]()
    run = target._model.forward

    def recording_forward(input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **others: Any) -> Any:
        seen.append((input_ids.shape[1], len(logits_to_keep)))
        return run(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)

    monkeypatch.setattr(target._model, "forward", recording_forward)
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
    model = AutoModelForCausalLM.from_config(config)
    vocabulary = Vocabulary(VOCAB, bytes(32), frozenset())
    position = 3 * 2 * 2 * 8 * 4
    assert TargetModel(model, vocabulary, "tiny", 1000 * position).context_length == 512
    assert TargetModel(model, vocabulary, "tiny", 300 * position).context_length == 256
    with pytest.raises(SettingsError, match=r"kv-memory is '37\.5 KiB'; allowed: 48\.0 KiB or more, for 128 tokens"):
        TargetModel(model, vocabulary, "tiny", 100 * position)


def test_sizes_are_parsed_with_their_units() -> None:
    sizes = {"4GiB": 2**32, "512M": 2**29, "1.5 gb": 3 * 2**29, "1000": 1000, "2KiB": 2048}
    assert {text: parse_size("kv-memory", text) for text in sizes} == sizes
    for text in ("", "much", "-1", "4 XB", "4GiB more"):
        with pytest.raises(SettingsError, match="kv-memory"):
            parse_size("kv-memory", text)
    assert kv_budget("1GiB", CPU) == 2**30
    assert 0 < kv_budget("auto", CPU) < memory.free_memory(CPU)
