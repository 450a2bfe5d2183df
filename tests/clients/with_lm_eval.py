"""lm-eval's local-completions against a running pair, on a task of its own.

The environment has the address, the key, the folder of the target (for its tokenizer),
and a file of questions with the log-likelihood of each choice as transformers computes it.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

URL, KEY, TARGET, QUESTIONS = (os.environ[f"EDGEDRAFT_{name}"] for name in ("URL", "API_KEY", "TARGET", "QUESTIONS"))
TASK = {
    "task": "rivers",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": QUESTIONS}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}


def test_log_likelihoods_are_the_targets_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        model="sample",
        base_url=f"{URL}/completions",
        tokenizer_backend="huggingface",
        tokenizer=TARGET,
        batch_size=2,
        max_retries=1,
    )
    result: Any = lm_eval.simple_evaluate(model=model, tasks=[TASK], bootstrap_iters=0)
    told = {
        sample["doc"]["question"]: [float(one) for one, *_ in sample["filtered_resps"]]
        for sample in result["samples"]["rivers"]
    }
    expected = [json.loads(line) for line in Path(QUESTIONS).read_text(encoding="utf-8").splitlines()]
    assert len(told) == len(expected)
    for one in expected:
        assert told[one["question"]] == pytest.approx(one["log_likelihoods"], abs=1e-3)
