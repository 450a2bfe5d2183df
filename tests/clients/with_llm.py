"""The command line of llm against a running pair, whose addresses and key are in the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

URL, KEY = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY"))
QUESTION = "Name a river of Europe."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "rank": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["name", "rank"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [
        {
            "model_id": "pair",
            "model_name": "sample",
            "api_base": URL,
            "api_key_name": "pair",
            "supports_schema": True,
            "supports_tools": True,
        }
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))


def llm(*options: str) -> str:
    command = [sys.executable, "-m", "llm", "-m", "pair", "--key", KEY, "--no-log", "-o", "max_tokens", "100"]
    done = subprocess.run([*command, *options, QUESTION], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_answer_is_streamed_or_whole() -> None:
    assert llm("-o", "temperature", "0") == llm("-o", "temperature", "0", "--no-stream") != ""


def test_an_answer_under_a_schema_is_valid() -> None:
    answer = json.loads(llm("--schema", json.dumps(SCHEMA), "-o", "temperature", "0"))
    assert 1 <= answer["rank"] <= 9
    assert len(answer["name"]) <= 20


def test_tools_are_offered() -> None:
    assert llm("--functions", "def river(country: str) -> str:\n    return 'Rhine'", "-o", "temperature", "0")
