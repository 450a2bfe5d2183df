"""Real GGUF files: a bundle's tokenizer follows the file's own rules, and answers end where the model ends its turn.

``make test-gguf`` downloads the files and runs these tests.
"""

import random
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.setup.bench_setup import bench_setup
from bench.setup.station_process import running_station
from common.gguf_metadata import GgufVocabulary, TokenType
from common.stop_ids import all_stop_ids, gguf_stop_sources
from device.settings import DraftSettings
from export.gguf_tokenizer import gguf_tokenizer
from export.packaged_file import PackagedFile
from export.tokenizer_check import check_tokenizer
from protocol.bundle import Manifest
from protocol.messages import Mode, Sampling
from tests.gguf_files import QWEN2_SPLIT, sentencepiece_referee, slow_byte_level_ids
from tests.gguf_models import FOLDER, GEMMA, QWEN

pytestmark = [pytest.mark.gguf, pytest.mark.timeout(1800)]

SENTENCES = [
    "The capital of France is Paris; isn't it? We've 1,234.50 reasons, they're 90% sure.",
    "def is_prime(n):\n    for d in range(2, n):\n\tif n % d == 0:\n\t\treturn False\n    return n >= 2  # done\n\n\n",
    "Größenwahn, Straße, naïveté, élève, œuvre, Ærø, žluťoučký kůň, İstanbul, ŁÓDŹ.",
    "Привет, как дела? Сегодня 24 ноября 2026 года.",
    "日本語の文章です。これは、ペンですか?カタカナとひらがな。",
    "今天天气很好,我们去公园吧。一二三四五六七八九十",
    "오늘 날씨가 참 좋네요. 안녕하세요!",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं? १२३",
    "สวัสดีชาวโลก กินข้าวหรือยัง",
    "Xin chào thế giới, bạn có khỏe không?",
    "Γειά σου Κόσμε, τι κάνεις;",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 🇫🇷 ½ ² ∑ ∞ → ≠ “quotes” – —",
    "<table><tr><td>1</td></tr></table> &amp; <b>bold</b> <unused_tag>",
    "a" * 40 + " " + "=" * 60 + " " + "-" * 33,
    " " * 37 + "x" + "\n" * 35 + "\t" * 5 + "y \n \n  z",
    "{\"key\": [1, 2.5e-10, null], \"ключ\": \"значение\"}\r\n\r\n",
    "ꦲꦤꦕꦫꦏ 𐎀𐎁𐎂 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ⅷ ٪",
]  # fmt: skip
LENGTH = 20_000


def multilingual_text() -> str:
    """20,000 characters of many scripts, in the form that normalisation leaves as it is."""
    rng = random.Random(20)  # noqa: S311 - no secret
    text = ""
    while len(text) < LENGTH:
        sentence = rng.choice(SENTENCES)
        start = rng.randrange(len(sentence)) if rng.random() < 0.3 else 0
        text += sentence[start:] + rng.choice(["", " ", "  ", "\n", "\n\n", "   "])
    return unicodedata.normalize("NFC", text[:LENGTH])


def slow_ids(model: PackagedFile, text: str) -> list[int]:
    vocabulary = vocabulary_of(model)
    if model is GEMMA:
        ids: list[int] = sentencepiece_referee(vocabulary).encode(text)
        return ids
    return slow_byte_level_ids(vocabulary, QWEN2_SPLIT, text)


@cache
def vocabulary_of(model: PackagedFile) -> GgufVocabulary:
    return GgufVocabulary.read(FOLDER / model.name)


@cache
def tokenizer_file(model: PackagedFile) -> Path:
    path = FOLDER / f"{model.name}.tokenizer.json"
    gguf_tokenizer(vocabulary_of(model)).backend_tokenizer.save(str(path))
    return path


@cache
def tokenizer_of(model: PackagedFile) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file(model)))


models = pytest.mark.parametrize("model", [GEMMA, QWEN], ids=lambda model: model.name)


@models
def test_a_multilingual_text_has_the_tokens_that_the_file_gives_it(model: PackagedFile) -> None:
    text = multilingual_text()
    assert tokenizer_of(model).encode(text, add_special_tokens=False).ids == slow_ids(model, text)


@models
def test_every_control_and_user_defined_token_encodes_to_its_id(model: PackagedFile) -> None:
    vocabulary = vocabulary_of(model)
    ids = vocabulary.of_type(TokenType.CONTROL, TokenType.USER_DEFINED)
    assert len(ids) > 20
    encoded = tokenizer_of(model).encode_batch([vocabulary.tokens[one] for one in ids], add_special_tokens=False)
    assert [encoding.ids for encoding in encoded] == [[token_id] for token_id in ids]


@models
def test_the_tokenizer_passes_the_check_of_the_export(model: PackagedFile) -> None:
    check_tokenizer(tokenizer_file(model))


@cache
def bundle_of(model: PackagedFile) -> Path:
    bundle = FOLDER / Path(model.name).stem
    command = ["-m", "export", "convert", str(FOLDER / model.name), str(bundle), "--precision", "int4"]
    subprocess.run([sys.executable, *command], check=True)
    return bundle


@pytest.mark.parametrize(
    ("model", "end"), [(GEMMA, "<end_of_turn>"), (QWEN, "<|im_end|>")], ids=lambda value: getattr(value, "name", value)
)
def test_a_bundle_stops_where_the_model_ends_its_turn(model: PackagedFile, end: str) -> None:
    bundle = bundle_of(model)
    manifest = Manifest.read(bundle)
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    assert tokenizer.token_to_id(end) in manifest.stop_ids
    assert set(manifest.stop_ids) == all_stop_ids(gguf_stop_sources(vocabulary_of(model)))
    text = multilingual_text()
    assert tokenizer.encode(text).ids == tokenizer_of(model).encode(text).ids


def test_an_answer_ends_where_the_model_ends_its_turn() -> None:
    """With Qwen's file as draft and target; Gemma's is a base model, which ends no turn."""
    bundle = bundle_of(QWEN)
    with running_station(str(FOLDER / QWEN.name), "bfloat16") as address, bench_setup(bundle, address) as setup:
        prompt = setup.prompt_ids("Say hello.")
        answer = setup.answer(prompt, 64, DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=4))
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == Tokenizer.from_file(str(bundle / "tokenizer.json")).token_to_id("<|im_end|>")
    assert "<|" not in answer.text
    assert answer.accepted > 0
