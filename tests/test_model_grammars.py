"""Grammars, penalties and log-probabilities with the sample model, end to end."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.setup.bench_setup import BenchSetup
from common.grammar import schema_grammar
from device.answers.answer import Answer
from device.answers.prompt_logprobs import prompt_logprobs
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling
from tests.sample import SAMPLE

pytestmark = pytest.mark.model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "chess", "rain"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
PROMPTS = ("Describe a person as JSON.", "Who is Ada Lovelace? Answer in JSON.")


def settings_of(mode: Mode, sampling: Sampling) -> DraftSettings:
    return DraftSettings(mode, sampling, uplink_k=1, draft_len=8)


def sampling_of(schema: dict[str, Any], seed: int | None = None) -> Sampling:
    return Sampling(0 if seed is None else 0.8, seed=seed or 0, grammar=schema_grammar(schema))


def answers(setup: BenchSetup, mode: Mode, sampling: Sampling, count: int = 128) -> list[Answer]:
    return [setup.answer(setup.prompt_ids(prompt), count, settings_of(mode, sampling)) for prompt in PROMPTS]


@pytest.mark.parametrize("seed", [None, 4])
def test_an_answer_under_a_schema_is_the_targets_own_and_valid(sample_setup: BenchSetup, seed: int | None) -> None:
    sampling = sampling_of(PERSON, seed)
    drafted = answers(sample_setup, Mode.COUPLED, sampling)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in answers(sample_setup, Mode.TARGET, sampling)]
    for one in drafted:
        value = json.loads(one.text)
        assert one.finish_reason == "stop"
        assert set(value) == {"name", "age", "likes"}
        assert len(value["name"]) <= 12
        assert 0 <= value["age"] <= 120
        assert set(value["likes"]) <= {"tea", "chess", "rain"}


def test_a_masked_draft_is_accepted_at_least_as_often(sample_setup: BenchSetup) -> None:
    settings = settings_of(Mode.IDS, sampling_of(PERSON))
    accepted = drafted = 0
    for prompt in PROMPTS:
        session = sample_setup.session(settings, sample_setup.prompt_ids(prompt))  # drafts without the grammar
        list(session.answer(128))
        accepted, drafted = accepted + session.counters.accepted, drafted + session.counters.drafted
        session.close()
    masked = answers(sample_setup, Mode.IDS, settings.sampling)
    assert sum(one.accepted for one in masked) / sum(one.drafted for one in masked) >= accepted / drafted


def test_penalties_change_the_answer_alike_with_and_without_a_draft_model(sample_setup: BenchSetup) -> None:
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((28, -100.0),), min_tokens=40)
    drafted, alone = (answers(sample_setup, mode, sampling, 64) for mode in (Mode.IDS, Mode.TARGET))
    assert [one.token_ids for one in drafted] == [one.token_ids for one in alone]
    assert all(28 not in one.token_ids and len(one.token_ids) >= 40 for one in drafted)


def test_a_prompts_log_probabilities_are_those_of_transformers(sample_setup: BenchSetup) -> None:
    ids = sample_setup.prompt_ids("Name the rivers of Europe, the longest one first, and say where each one ends. " * 5)
    told = prompt_logprobs(sample_setup.client, ids, 1)
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert [one.logprob for one in told] == pytest.approx(expected, abs=1e-3)
    assert [one.top[0][0] for one in told] == rows[:-1].argmax(-1).tolist()
