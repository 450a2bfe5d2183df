"""Int8 weights against packed ones, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from basestation.target.int8_linear import int8_obstacle
from bench.station import weights as command
from bench.station.weights import weights
from tests.tiny_source import save_model

_OBSTACLE = int8_obstacle(torch.device("cpu"))


@pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))
@pytest.mark.parametrize("has_bfloat16", sorted({False, torch.ops.mkldnn._is_mkldnn_bf16_supported()}))
def test_passes_layers_and_agreement_are_measured(
    has_bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MIXTURES", {"int8, all rotated": lambda _: True})
    monkeypatch.setattr(command, "_REPEATS", 3)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    prompts, found = tmp_path / "prompts.jsonl", tmp_path / "weights.json"
    prompts.write_text(json.dumps({"category": "math", "turns": ["Add 2 and 3."]}) + "\n")
    weights(str(save_model(tmp_path / "target")), prompts, 1, 8, found)
    (row,) = json.loads(found.read_text())["rows"]
    assert row["argmax"] > 0.5
    assert row["overlap"] > 0.8
    for rows in (1, 9, 80):
        assert row[f"milliseconds_{rows}_rows"] > 0
        assert " to " in row[f"over_packed_{rows}_rows"]
        assert " to " in row[f"layers_over_packed_{rows}_rows"]
