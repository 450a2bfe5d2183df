"""Weight files leave resident memory once the target holds what it needs; no weight changes."""

import gc
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from basestation.kv_cache.heap import return_free_memory
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.target.target_model import TargetModel
from basestation.target.weight_pages import release_weight_pages
from protocol.errors import OverloadError
from tests.tiny_source import save_tokenizer
from tests.tiny_target import CPU, tiny_config

VALUES = 2**22


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose embedding has 16 MiB."""
    with CPU:
        torch.manual_seed(0)
        config = tiny_config("llama", hidden_size=1024, vocab_size=VALUES // 1024)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def resident(folder: Path) -> int:
    """Bytes of the weight file that are resident in this process."""
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(one.rss for one in maps if one.path == str(folder / "model.safetensors"))


def test_a_loaded_target_keeps_no_weight_file_in_memory(folder: Path) -> None:
    target = TargetModel.load(str(folder), "float32", "cpu", "16MiB")
    assert target.vocabulary.size > 0
    assert resident(folder) < VALUES


def test_weights_are_the_same_afterwards_also_those_that_were_changed(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    assert resident(folder) > 4 * VALUES
    release_weight_pages(model)
    assert resident(folder) < VALUES
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    with torch.no_grad():
        weights["model.norm.weight"] += 1
    release_weight_pages(model)
    assert torch.equal(weights["model.norm.weight"], before["model.norm.weight"] + 1)


def test_mapped_files_are_no_memory_that_peers_take(folder: Path) -> None:
    gc.collect()
    return_free_memory()
    guard = MemoryGuard.of_process(kv_bytes=0, for_peers=2 * VALUES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(weight.sum() for weight in model.parameters()) != 0
    assert resident(folder) > 4 * VALUES
    guard.check()
    held = bytearray(b"1") * (32 * VALUES)
    with pytest.raises(OverloadError):
        guard.check()
    assert len(held) == 32 * VALUES
