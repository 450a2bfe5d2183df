"""A draft model that knows only the first of the target's tokens changes no answer's distribution."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from scipy.stats import chisquare

from basestation.engine import engine
from basestation.verification.verify import RoundToVerify, verify_rounds
from device.drafting.draft_model import DraftModel
from device.settings import DraftSettings
from protocol.messages import PROTOCOL_VERSION, Draft, Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, Table, blend, manifest, next_logits, random_table, target_alone
from tests.link_pair import IDS, Station, join, open_session
from tests.p_values import FALSE_ALARM
from tests.slow_verify import target_probs, verify_one
from tests.tiny_bundle import VOCAB as GRAPH_TOKENS
from tests.tiny_bundle import write_bundle

VOCAB, KNOWN = 12, 7
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.8)
PROMPT = [3, 1, 4]
SAMPLED = Sampling(0.9, seed=7)
LIMITED = Sampling(0.9, 9, 0.9, 7)


class SmallDraftModel(FakeDraftModel):
    """Knows the tokens below ``KNOWN``; other committed tokens count as 0."""

    def forward(self, token_ids: list[int]) -> np.ndarray:  # type: ignore[override]
        super().forward(token_ids)
        return next_logits(self.table, [one if one < KNOWN else 0 for one in self.tokens])[:KNOWN]


def small_draft(table: Table = DRAFT, stop_ids: tuple[int, ...] = ()) -> DraftModel:
    return cast(DraftModel, SmallDraftModel(table, manifest(KNOWN, stop_ids)))


def answer(mode: Mode, sampling: Sampling, count: int = 40, prompt: list[int] = PROMPT) -> list[int]:
    station, model = Station(FakeTarget.make(TARGET)), small_draft()
    client, _ = join(station, model)
    assert (client.welcome.version, client.welcome.vocab_size) == (PROTOCOL_VERSION, VOCAB)
    session = open_session(client, DraftSettings(mode, sampling, 4, 4), model, list(prompt))
    return [token.token_id for token in session.answer(count)]


@pytest.mark.parametrize("mode", Mode)
def test_greedy_answers_are_the_targets_own(mode: Mode) -> None:
    expected = target_alone(TARGET, PROMPT, 40)
    assert max(expected) >= KNOWN
    assert answer(mode, Sampling()) == expected


@pytest.mark.parametrize("sampling", [SAMPLED, LIMITED], ids=repr)
def test_coupled_answers_are_the_targets_own_with_the_same_seed(sampling: Sampling) -> None:
    expected = answer(Mode.TARGET, sampling)
    assert max(expected) >= KNOWN
    assert answer(Mode.COUPLED, sampling) == expected


@pytest.mark.parametrize("sampling", [SAMPLED, LIMITED], ids=repr)
@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.TOPP, Mode.FULL])
def test_every_round_is_verified_as_the_slow_twin_does(
    mode: Mode, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RoundToVerify] = []

    def checked(logits: object, rounds: list[RoundToVerify]) -> object:
        results = verify_rounds(logits, rounds)  # type: ignore[arg-type]
        for one, result in zip(rounds, results, strict=True):
            assert result == verify_one(logits.numpy(), one)  # type: ignore[attr-defined]
            seen.append(one)
        return results

    monkeypatch.setattr(engine, "verify_rounds", checked)
    assert max(answer(mode, sampling, 60)) >= KNOWN
    sent = [distribution for one in seen for distribution in one.distributions]
    assert len(sent) == sum(len(one.drafted) for one in seen) > 0
    assert all(distribution.vocab_size == VOCAB for distribution in sent)
    assert all(distribution.support[distribution.weights > 0].max() < KNOWN for distribution in sent)
    assert all(token_id < KNOWN for one in seen for token_id in one.drafted)


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL])
def test_sampled_answers_are_distributed_as_the_targets_own(mode: Mode) -> None:
    """Answers of two tokens, over many seeds at one base station."""
    station, model, samples = Station(FakeTarget.make(TARGET)), small_draft(), 1500
    client, _ = join(station, model)
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(samples):
        session = open_session(client, DraftSettings(mode, Sampling(seed=seed, temperature=1.0), 4, 1), model, PROMPT)
        one, other = (token.token_id for token in session.answer(2))
        counts[one, other] += 1
        session.close()
    sampling = Sampling(1.0)
    first = target_probs(next_logits(TARGET, PROMPT), sampling)
    exact = np.array([first[one] * target_probs(next_logits(TARGET, [4, one]), sampling) for one in range(VOCAB)])
    frequent = exact * samples >= 5
    expected = np.append(exact[frequent], exact[~frequent].sum()) * samples
    observed = np.append(counts[frequent], counts[~frequent].sum())
    assert chisquare(observed, expected).pvalue > FALSE_ALARM


def test_an_answer_ends_at_the_targets_stop_ids_which_the_draft_model_need_not_know() -> None:
    tokens = target_alone(TARGET, PROMPT, 40)
    stop = next(one for one in tokens if one >= KNOWN)
    expected = tokens[: tokens.index(stop) + 1]
    for mode in (Mode.IDS, Mode.COUPLED, Mode.TOPK, Mode.TARGET):
        model = small_draft(stop_ids=(2,))
        client, _ = join(Station(FakeTarget.make(TARGET, frozenset({stop}))), model)
        session = open_session(client, DraftSettings(mode, Sampling(), 4, 4), model, list(PROMPT))
        assert [token.token_id for token in session.answer(40)] == expected


def test_the_frames_are_encoded_for_the_targets_vocabulary() -> None:
    """300 tokens need 9 bits; the draft model's 200 would need 8."""
    size, known = 300, 200
    model = FakeDraftModel.make(np.zeros((known, known, known), np.float32))
    table = np.zeros((2, 2, size), np.float32)
    station = Station(FakeTarget.make(np.broadcast_to(table[0, 0], (size, size, size))))
    client, link = join(station, model)
    assert client.vocab_size == size
    assert vars(link)["_codec"].vocab_size == size
    draft = Draft(0, 1, (1, 2, 199))
    assert vars(link)["_codec"].encode(draft) == station.codec.encode(draft)


def test_tokens_that_the_graph_of_a_bundle_does_not_have_change_no_answer(tmp_path: Path) -> None:
    model = DraftModel(write_bundle(tmp_path / "bundle", random_table(GRAPH_TOKENS, seed=3)[0]))
    target = random_table(GRAPH_TOKENS + 4, seed=1)
    client, _ = join(Station(FakeTarget.make(target)), model)
    session = open_session(client, IDS, model, list(PROMPT))
    tokens = [token.token_id for token in session.answer(40)]
    assert tokens == target_alone(target, PROMPT, 40)
    assert model.token_ids[:40] == [*PROMPT, *tokens][:40]
    assert max(model.token_ids) >= GRAPH_TOKENS
