"""The sample models: downloaded once, written completely or not at all."""

import errno
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from common.stop_ids import all_stop_ids
from export import sample
from export.model_card import Provenance, read_model_card
from export.packaged_file import PackagedFile, Part
from export.sample import make_sample
from export.sample_models import SAMPLE_MODELS, SampleModel, SampleName
from export.source import load_config, load_model, load_tokenizer, stop_sources_of
from protocol.errors import ModelError, SettingsError
from tests.gguf_files import TINY_HIDDEN, tiny_model_file
from tests.sample import SAMPLE
from tests.screen import CONSOLE


@pytest.fixture
def failing_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An empty cache and a pip that cannot download; yields pip's command lines."""
    calls: list[list[str]] = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(sample, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return calls


@pytest.mark.parametrize("name", SampleName)
def test_without_a_network_it_raises_one_error_and_leaves_no_folder(
    name: SampleName, failing_pip: list[list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"\(no network\); check the network") as caught:
        make_sample(tmp_path / "sample", CONSOLE, name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sample").exists()
    assert not list((tmp_path / "cache" / "edgedraft").iterdir())
    assert len(failing_pip) == 1


@pytest.mark.parametrize("name", SampleName)
def test_each_part_is_pinned_to_its_own_hash(name: SampleName) -> None:
    file = SAMPLE_MODELS[name].file
    hashes = [file.sha256, *(part.wheel_sha256 for part in file.parts)]
    assert len(set(hashes)) == len(hashes)
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in hashes)


def test_a_folder_with_other_content_is_refused(failing_pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="DIR"):
        make_sample(tmp_path, CONSOLE)
    assert not failing_pip


def test_too_little_memory_is_refused_before_the_download(
    failing_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    with pytest.raises(ModelError, match=r"GB of memory are needed and 1.0 GB are free"):
        make_sample(tmp_path / "sample", CONSOLE)
    assert not failing_pip
    assert not list(tmp_path.iterdir())


def test_download_and_folder_share_the_room_of_one_disk(
    failing_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SAMPLE_MODELS[SampleName.SMOLLM2_135M]
    either = model.file.size + model.folder_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=either + model.file.size - 1))
    with pytest.raises(ModelError, match="GB of disk are needed"):
        make_sample(tmp_path / "sample", CONSOLE)
    assert not failing_pip
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleModel:
    """A tiny model in place of the smallest sample model; it needs no download."""
    path = tiny_model_file(tmp_path / "tiny.gguf")
    file = PackagedFile(path.name, path.stat().st_size, 64 * "0", (Part("tiny", "1.0", path.name, 64 * "0"),))
    tiny = SampleModel("Someone/Tiny", "apache-2.0", file, "bfloat16", TINY_HIDDEN, folder_bytes=0, memory_bytes=0)
    monkeypatch.setattr(PackagedFile, "join", lambda *_: path)
    monkeypatch.setattr(PackagedFile, "missing_parts", lambda *_: [])
    monkeypatch.setattr(sample, "SAMPLE_MODELS", dict.fromkeys(SampleName, tiny))
    return tiny


def test_a_sample_model_is_written_once_with_its_licence_and_source(tiny: SampleModel, tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    assert make_sample(folder, CONSOLE)
    assert not make_sample(folder, CONSOLE)
    assert read_model_card(folder) == Provenance("Someone/Tiny", "apache-2.0")
    assert tiny.file.sha256 in (folder / "README.md").read_text()
    assert load_config(folder).dtype is torch.bfloat16
    assert load_model(folder).dtype is torch.float32


def test_the_folder_of_another_sample_model_is_refused(
    tiny: SampleModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sample(tmp_path / "sample", CONSOLE)
    monkeypatch.undo()
    with pytest.raises(SettingsError, match="the complete sample model qwen"):
        make_sample(tmp_path / "sample", CONSOLE, SampleName.QWEN_CODER_1500M)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_or_a_full_disk_leaves_no_folder(
    failure: BaseException, tiny: SampleModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *_: object) -> None:
        assert (folder / "model.safetensors").is_file()
        raise failure

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sample, "write_model_card", fail)
    with pytest.raises(type(failure)):
        make_sample(tmp_path / "sample", CONSOLE)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.model
def test_the_tokenizer_and_the_model_have_the_same_stop_id(failing_pip: list[list[str]]) -> None:
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
