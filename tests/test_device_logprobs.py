"""Log-probabilities: the target's own, whatever was drafted, of the answer and of the prompt."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from device.answers.prompt_logprobs import prompt_logprobs
from device.settings import DraftSettings
from protocol.errors import StateError
from protocol.logprobs import TokenLogprobs
from protocol.messages import Draft, Hello, Message, Mode, Open, Opened, Sampling, Verdict
from protocol.rounds import SessionRounds
from tests.fakes import PROMPT, FakeDraftModel, FakeTarget, blend, next_logits, random_table
from tests.link_pair import CopyCount, MemoryTransport, Station, deliver_once, join, open_session

VOCAB = 24
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)


def log_probs(tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Of the token after ``tokens``, [V]."""
    logits = next_logits(TARGET, tokens).astype(np.float64)
    normalised: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum())
    return normalised


def assert_told(told: TokenLogprobs | None, tokens: Sequence[int], token_id: int, most: int) -> None:
    expected = log_probs(tokens)
    assert told is not None
    assert told.logprob == pytest.approx(expected[token_id], abs=1e-5)
    assert [one for one, _ in told.top] == np.argsort(-expected)[:most].tolist()
    assert [logprob for _, logprob in told.top] == pytest.approx(np.sort(expected)[::-1][:most], abs=1e-5)


def transport_with(down: CopyCount = deliver_once) -> MemoryTransport:
    return MemoryTransport(Station(FakeTarget.make(TARGET)), down=down)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("most", [0, 3])
def test_each_token_has_the_targets_log_probability(mode: Mode, most: int) -> None:
    sampling = Sampling(0 if mode is Mode.IDS else 0.8, seed=3, presence_penalty=1.0, logprobs=most)
    model, transport = FakeDraftModel.make(DRAFT), transport_with()
    settings = DraftSettings(mode, sampling, 4, 4, drafts_ahead=1)
    session = open_session(join(transport.station, model, transport)[0], settings, model, PROMPT)
    tokens = [*PROMPT]
    for token in session.answer(30):
        assert_told(token.logprobs, tokens, token.token_id, most)
        tokens.append(token.token_id)
    plain = open_session(
        join(transport.station, model, MemoryTransport(transport.station, b"b"))[0],
        replace(settings, sampling=replace(sampling, logprobs=None)),
        model,
        PROMPT,
    )
    without = list(plain.answer(30))
    assert [token.token_id for token in without] == tokens[len(PROMPT) :]
    assert all(token.logprobs is None for token in without)


def test_a_repeated_verdict_has_its_log_probabilities() -> None:
    lost: set[int] = set()

    def lose_once(message: Message) -> int:
        if not isinstance(message, Verdict) or message.round_id in lost:
            return 1
        lost.add(message.round_id)
        return 0

    model, transport = FakeDraftModel.make(DRAFT), transport_with(lose_once)
    settings = DraftSettings(Mode.IDS, Sampling(logprobs=2), 4, 4)
    session = open_session(join(transport.station, model, transport)[0], settings, model, PROMPT)
    tokens = [*PROMPT]
    for token in session.answer(20):
        assert_told(token.logprobs, tokens, token.token_id, 2)
        tokens.append(token.token_id)
    assert lost


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 150])
def test_a_prompt_has_the_targets_log_probabilities(length: int) -> None:
    prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    transport = transport_with()
    told = prompt_logprobs(join(transport.station, FakeDraftModel.make(DRAFT), transport)[0], prompt, 2)
    assert len(told) == length - 1
    for index, one in enumerate(told, 1):
        assert_told(one, prompt[:index], prompt[index], 2)
    assert transport.station.engine.idle or not transport.station.engine.busy
    registry = vars(transport.station.engine)["_metrics"].registry  # the tokens were no drafts
    assert not registry.get_sample_value("edgedraft_drafted_tokens_total", {"mode": Mode.TARGET})
    assert not registry.get_sample_value("edgedraft_accepted_tokens_total", {"mode": Mode.TARGET})


def test_a_prompts_log_probabilities_survive_a_restart_of_the_base_station() -> None:
    prompt = np.random.default_rng(7).integers(0, VOCAB, 150).tolist()
    transport = transport_with()
    verdicts: list[Message] = []

    def restart_at_the_second_verdict(message: Message) -> int:
        verdicts.extend([message] if isinstance(message, Verdict) else [])
        if len(verdicts) == 2 and isinstance(message, Verdict):
            transport.station = Station(FakeTarget.make(TARGET))
            return 0
        return 1

    transport.down = restart_at_the_second_verdict
    told = prompt_logprobs(join(transport.station, FakeDraftModel.make(DRAFT), transport)[0], prompt, 0)
    assert [one.logprob for one in told] == pytest.approx(
        [log_probs(prompt[:index])[prompt[index]] for index in range(1, 150)], abs=1e-5
    )
    assert len(verdicts) > 3


@pytest.mark.parametrize(
    "messages",
    [
        [Open(0, 0, Mode.IDS, Sampling(), (1,)), Opened(0, 0), Draft(0, 1, (2,), given=True)],
        [Open(0, 0, Mode.TARGET, Sampling(), (1,)), Opened(0, 0), Draft(0, 1, (), given=True)],
        [
            Open(0, 0, Mode.TARGET, Sampling(), (1,)),
            Opened(0, 0),
            Draft(0, 1, (2,), given=True),
            Draft(0, 2, (2,), given=True),
        ],
        [
            Open(0, 0, Mode.TARGET, Sampling(), (1,)),
            Opened(0, 0),
            Draft(0, 1, (2,), given=True),
            Verdict(0, 1, 1, 3, (TokenLogprobs(-1.0),)),
        ],
    ],
    ids=["mode", "no tokens", "in flight", "number of log-probabilities"],
)
def test_invalid_given_drafts_and_log_probabilities_are_refused(messages: list[Message]) -> None:
    rounds = SessionRounds(frozenset(), 4)
    for message in messages[:-1]:
        rounds.advance(message)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"given tokens|log-probabilities of 1 tokens of 2"):
        rounds.advance(messages[-1])  # type: ignore[arg-type]


def test_an_older_base_station_is_not_asked() -> None:
    class Version4Transport(MemoryTransport):
        def send(self, frame: bytes) -> None:
            message = self.station.codec.decode(frame)
            old = replace(message, version=4) if isinstance(message, Hello) else message
            super().send(self.station.codec.encode(old))

    transport = Version4Transport(Station(FakeTarget.make(TARGET)))
    client, _ = join(transport.station, FakeDraftModel.make(DRAFT), transport)
    with pytest.raises(Exception, match=r"logprobs is 1; .* protocol version 4, this needs 5"):
        prompt_logprobs(client, PROMPT, 1)
