"""A GGUF target is converted once, by its content; whatever prevents keeping it, the target is served."""

import errno
import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from basestation.target import gguf_cache, pretrained
from basestation.target.gguf_cache import cache_entry, fill
from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from protocol.errors import ModelError
from tests.gguf_files import tiny_model_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny_model_file(tmp_path / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the user's."""
    monkeypatch.setattr(gguf_cache, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that transformers loads weights from."""
    paths, load = [], pretrained._load

    def recorded(model: str, dtype: torch.dtype, placement: torch.device) -> Any:
        paths.append(model)
        return load(model, dtype, placement)

    monkeypatch.setattr(pretrained, "_load", recorded)
    return paths


def load(file: Path, dtype: str = "float32", *, use_cache: bool = True) -> TargetModel:
    return TargetModel.load(str(file), dtype, "cpu", "16MiB", use_cache)


def logits(target: TargetModel) -> torch.Tensor:
    return target.forward([Segment(target.new_kv_cache(), [1, 2, 3, 4], 4)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_start_reads_the_converted_weights_and_gives_the_same_logits(
    dtype: str, file: Path, loaded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    entry = str(cache_entry(file, getattr(torch, dtype)))
    with caplog.at_level(logging.INFO, logger="basestation.target.pretrained"):
        first = load(file, dtype)
    assert f"converting {file} once, into {entry}; with --no-cache" in caplog.text
    second, without = load(file, dtype), load(file, dtype, use_cache=False)
    assert loaded == [str(file), entry, entry, str(file)]
    assert torch.equal(logits(first), logits(without))
    assert torch.equal(logits(second), logits(without))
    assert second.vocabulary == without.vocabulary
    assert second.name == "tiny"


def test_an_entry_belongs_to_the_content_the_dtype_and_the_version(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(file, copy)
    entry = cache_entry(file, torch.float32)
    assert cache_entry(copy, torch.float32) == entry
    with copy.open("ab") as content:
        content.write(b"\0")
    others = [cache_entry(copy, torch.float32), cache_entry(file, torch.bfloat16)]
    monkeypatch.setattr("basestation.target.gguf_cache.transformers.__version__", "9.9.9")
    others.append(cache_entry(file, torch.float32))
    assert len({entry, *others}) == 4


def test_without_the_cache_nothing_is_written(file: Path, cache: Path) -> None:
    load(file, use_cache=False)
    assert not cache.exists()


def test_a_full_disk_is_one_line_and_the_target_is_served(
    file: Path, cache: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert logits(load(file)).shape[0] == 4
    assert [
        record.message
        for record in caplog.records
        if "is not kept in" in record.message and "are free" in record.message
    ]
    assert loaded == [str(file)]
    assert not list(cache.rglob("*.safetensors"))
    assert not list(cache.rglob(".unfinished-*"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_or_is_interrupted_leaves_nothing(
    failure: BaseException, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_model: Any, folder: str) -> None:
        Path(folder, "model.safetensors").touch()
        raise failure

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    if isinstance(failure, OSError):
        load(file)
        assert "is not kept in" in caplog.text
        assert "No space left on device" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            load(file)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_what_a_killed_process_left_is_removed(file: Path) -> None:
    entry = cache_entry(file, torch.float32)
    assert entry is not None
    abandoned = entry.parent / ".unfinished-abcdefgh"
    abandoned.mkdir(parents=True)
    load(file)
    assert list(entry.parent.iterdir()) == [entry]


def tiny_model() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


def test_of_several_processes_one_converts_and_the_others_use_its_entry(cache: Path) -> None:
    entry, loads, second_loads = cache / "gguf" / "sha" / "float32", list[str](), threading.Event()

    def load() -> Any:
        loads.append(threading.current_thread().name)
        if len(loads) == 1:
            second.start()
            second_loads.wait(0.3)
        else:
            second_loads.set()
        return tiny_model()

    results = list[bool]()
    second = threading.Thread(target=lambda: results.append(fill(entry, 1, load)))
    results.append(fill(entry, 1, load))
    second.join()
    assert results == [True, True]
    assert len(loads) == 1


def test_an_entry_that_another_machine_wrote_meanwhile_is_used(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = cache / "gguf" / "sha" / "float32"

    def load() -> Any:
        tiny_model().save_pretrained(entry)
        return tiny_model()

    assert fill(entry, 1, load)
    assert caplog.text == ""
    assert [path.name for path in entry.parent.iterdir()] == ["float32"]


def test_a_user_without_a_cache_directory_is_served(
    file: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(gguf_cache, "user_cache_path", fail)
    load(file)
    assert loaded == [str(file)]


def test_a_damaged_file_is_one_line_and_leaves_nothing(file: Path, cache: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
    assert not cache.exists()
