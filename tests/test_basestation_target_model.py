"""Packed batches of every supported architecture against its own forward pass; refusals before loading."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basestation.kv_cache import memory
from basestation.kv_cache.kv_pool import SequenceKVCache
from basestation.kv_cache.memory import check_fits, kv_budget, parameter_count
from basestation.sizes import parse_size
from basestation.target import packed_linear, pretrained
from basestation.target.attention import ATTENTION_NAME
from basestation.target.pretrained import register_attention, weight_files
from basestation.target.segment import Segment
from basestation.target.supported_models import ROPE_TYPES, SUPPORTED, refuse_unsupported
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from common.gguf_rope import refuse_gguf_rope
from protocol.errors import ModelError, SettingsError
from tests.fakes import token_names

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
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
WINDOW = 8
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"sliding_window": WINDOW, "use_sliding_window": True},
    "smollm3": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "no_rope_layer_interval": 2,
    },
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
    return AutoConfig.for_model(architecture, **{**TINY, **EXPERTS.get(architecture, {}), **changes})


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
    return plain, TargetModel(packed, Vocabulary(token_names(VOCAB), VOCAB, frozenset()), architecture, 2**24)


ROPE_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    },
}
ROPE_TYPES_OF = {"phi3": ("default",), "olmo2": ("default", "linear")}
"""What configurations of transformers allow; all types for other architectures."""
ROPE_CASES = [
    (architecture, kind) for architecture in SUPPORTED for kind in ROPE_TYPES_OF.get(architecture, ROPE_TYPES)
]


def with_rope(architecture: str, kind: str) -> dict[str, Any]:
    """The changes to a tiny configuration for a rope type, at the name that the installed transformers has."""
    settings = ROPE_SETTINGS[kind]
    if not hasattr(tiny_config(architecture), "rope_parameters"):
        if kind == "default":
            return {}
        if architecture == "olmo2":
            settings = {"type": kind, "factor": 4.0}
        if architecture == "phi3":
            settings = {"type": kind, **{name: settings[name] for name in ("short_factor", "long_factor")}}
        return {"rope_scaling": settings}
    theta = {"rope_theta": 10_000.0, **({"partial_rotary_factor": 0.5} if architecture == "phi" else {})}
    if architecture == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 10_000.0}
        return {"rope_parameters": {"full_attention": {**theta, **settings}, "sliding_attention": local}}
    return {"rope_parameters": {**theta, **settings}}


def ids(length: int, seed: int) -> list[int]:
    token_ids: list[int] = torch.randint(
        3, VOCAB, (length,), generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    ).tolist()
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


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mamba", "t5"])
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"architecture '{architecture}' is not supported; supported: .*llama.*qwen3"):
        refuse_unsupported(AutoConfig.for_model(architecture))


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


@pytest.mark.parametrize(
    ("architecture", "kind"), [*(("llama", kind) for kind in ("dynamic", "longrope")), ("phi3", "longrope")]
)
def test_a_batch_dependent_rope_type_is_refused_by_name(architecture: str, kind: str) -> None:
    config = tiny_config(architecture, **with_rope(architecture, kind), original_max_position_embeddings=64)
    with pytest.raises(ModelError, match=f"rope type '{kind}' is not supported: .*; supported: default, linear"):
        refuse_unsupported(config)


def config_like(**fields: Any) -> Any:
    """A configuration as another version of transformers may lay it out."""
    config = SimpleNamespace(model_type="llama", **fields)
    config.get_text_config = lambda: config
    return config


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "proportional"])
def test_every_layout_of_rope_settings_is_read(name: str, nested: bool, key: str, kind: str) -> None:
    settings: dict[str, Any] = {key: kind, "factor": 2.0}
    if nested:
        settings = {"sliding_attention": {"rope_type": "default"}, "full_attention": settings}
    with pytest.raises(ModelError, match=f"rope type '{kind}' is not supported"):
        refuse_unsupported(config_like(**{name: settings}))


@pytest.mark.parametrize("settings", [{}, None, {"rope_type": "yarn", "factor": 2.0}, {"type": "linear"}])
def test_other_rope_settings_are_served(settings: dict[str, Any] | None) -> None:
    refuse_unsupported(config_like(rope_scaling=settings))
    refuse_unsupported(config_like(rope_parameters=settings))


@pytest.mark.parametrize(("placement", "device_map"), [("cuda", {"": "cuda"}), ("cpu", None)])
def test_weights_go_straight_to_a_gpu(
    placement: str, device_map: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda source, **options: given.update(options))
    pretrained._load(str(tmp_path), torch.bfloat16, torch.device(placement))
    assert given.get("device_map") == device_map


def test_a_bidirectional_model_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="use_bidirectional_attention is not supported"):
        refuse_unsupported(tiny_config("gemma3_text", use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("scaling", "tensor", "match"),
    [
        ("yarn", "", "llama.rope.scaling.type 'yarn', which is not read from GGUF; name the model's folder"),
        ("", "rope_freqs.weight", "the tensor 'rope_freqs.weight', which is not read; name the model's folder"),
        ("", "rope_factors_long.weight", "the tensor 'rope_factors_long.weight'"),
        ("none", "token_embd.weight", ""),
    ],
)
def test_a_gguf_file_with_scaled_positions_is_refused(scaling: str, tensor: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    if tensor:
        writer.add_tensor(tensor, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not match:
        refuse_gguf_rope(path)
        return
    with pytest.raises(ModelError, match=match):
        TargetModel.load(str(path))


def test_a_target_that_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", hidden_size=1024, num_hidden_layers=16, intermediate_size=4096, vocab_size=32000)
    check_fits(config, torch.float32, CPU)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**20)
    with pytest.raises(
        ModelError, match=r"0\.27 billion parameters in float32 take 1\.0 GiB, and 1\.0 MiB are free on cpu"
    ):
        check_fits(config, torch.float32, CPU)


def test_a_target_for_int8_weights_needs_the_memory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "packed_dtype", lambda _: torch.float32)  # no bfloat16 instructions
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * parameter_count(config))
    assert weight_files(str(tmp_path), torch.bfloat16, CPU, 1, int8=True, use_cache=True) == str(tmp_path)
    with pytest.raises(ModelError, match="parameters in bfloat16 take"):
        weight_files(str(tmp_path), torch.bfloat16, CPU, 1, int8=False, use_cache=True)


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


def test_sizes_are_parsed_with_their_units() -> None:
    sizes = {"4GiB": 2**32, "512M": 2**29, "1.5 gb": 3 * 2**29, "1000": 1000, "2KiB": 2048}
    assert {text: parse_size("kv-memory", text) for text in sizes} == sizes
    for text in ("", "much", "-1", "4 XB", "4GiB more", "9" * 400):
        with pytest.raises(SettingsError, match="kv-memory"):
            parse_size("kv-memory", text)
    assert kv_budget("1GiB", CPU) == 2**30
    assert 0 < kv_budget("auto", CPU) < memory.free_memory(CPU)
