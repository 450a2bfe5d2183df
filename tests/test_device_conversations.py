"""Several conversations are kept: each turn sends and runs only what is new, within the limits of both ends."""

from collections import Counter
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from device.answers.conversations import Conversations
from device.planning.planners import Planners
from device.text.tokenizer import Tokenizer
from protocol.errors import ContextLengthError
from protocol.limits import Limits
from protocol.messages import Fault, Message, Sampling, Verdict
from tests.fakes import PROMPT, FakeDraftModel, FakeTarget, target_alone
from tests.json_tokens import COMPILER
from tests.link_pair import MemoryTransport, Station, join
from tests.number_service import (
    DRAFT,
    TARGET,
    NumberTokenizer,
    complete,
    content_of,
    http_client,
    next_turn,
    settings,
    text_of,
)

SYSTEM = [7, 3, 9, 1] * 10
NEW_TOKENS = 6


class Program:
    """A program with a conversation of its own; it checks each answer against the target alone."""

    def __init__(self, client: TestClient, name: int, system: list[int] = SYSTEM) -> None:
        self._client = client
        self._messages: list[Any] = [{"role": "system", "content": text_of(system)}]
        self._tokens = list(system)
        self._name = name

    def take_turn(self, **fields: Any) -> None:
        """Ask, and check the answer."""
        turn = [self._name, len(self._messages) % 20]
        self._messages.append({"role": "user", "content": text_of(turn)})
        self._tokens += turn
        answer = complete(self._client, messages=self._messages, max_tokens=NEW_TOKENS, **fields)
        expected = target_alone(TARGET, self._tokens, NEW_TOKENS)
        assert content_of(answer) == text_of(expected)
        self._messages.append({"role": "assistant", "content": content_of(answer)})
        self._tokens += expected

    def ask(self, text: str, **fields: Any) -> Any:
        """The response to another turn, which is not remembered."""
        return complete(self._client, messages=[*self._messages, {"role": "user", "content": text}], **fields)

    def edit_last_turn(self) -> None:
        """Forget the last question and its answer."""
        del self._messages[-2:]
        del self._tokens[-NEW_TOKENS - 2 :]


class SentMessages:
    """Counts the messages by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, message: Message) -> int:
        self.counts[type(message).__name__] += 1
        return 1


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass of the draft model."""
    forward, counts = FakeDraftModel.forward, list[int]()

    def counted(model: FakeDraftModel, token_ids: list[int]) -> Any:
        counts.append(len(token_ids))
        return forward(model, token_ids)

    monkeypatch.setattr(FakeDraftModel, "forward", counted)
    return counts


def new_station(**limits: int) -> Station:
    return Station(FakeTarget.make(TARGET, grammar_compiler=COMPILER), Limits(**limits))


def test_programs_that_take_turns_continue_their_own_conversations(run: list[int]) -> None:
    sent = SentMessages()
    with http_client(new_station(), sent) as client:
        programs = [Program(client, name) for name in (1, 2, 3)]
        for program in programs:
            program.take_turn()
        after_first_turns = len(run)
        for _ in range(4):
            for program in programs:
                program.take_turn()
    assert sent.counts["Open"] == 3
    assert sent.counts["Extend"] == 12
    assert max(run[after_first_turns:]) < 10


def test_a_new_conversation_runs_only_what_no_other_begins_with(run: list[int]) -> None:
    with http_client(new_station()) as client:
        Program(client, 1).take_turn()
        assert max(run) > len(SYSTEM)
        run.clear()
        Program(client, 2).take_turn()
    assert max(run) < 10


def test_an_edited_question_keeps_both_conversations(run: list[int]) -> None:
    sent = SentMessages()
    with http_client(new_station(), sent) as client:
        program = Program(client, 1)
        program.take_turn()
        program.take_turn()
        run.clear()
        program.edit_last_turn()
        program.take_turn()
        assert max(run) < 10
    assert sent.counts["Open"] <= 2


def test_settings_of_another_mode_open_a_session_and_run_nothing_anew(run: list[int]) -> None:
    sent = SentMessages()
    with http_client(new_station(), sent) as client:
        program = Program(client, 1)
        program.take_turn()
        run.clear()
        program.take_turn(temperature=1.0, top_k=1)
    assert sent.counts["Open"] == 2
    assert max(run) < 10


def test_the_least_recently_used_conversation_is_dropped_beyond_the_budget() -> None:
    sent = SentMessages()
    with http_client(new_station(), sent, cache_tokens=120) as client:
        first, second, third = (Program(client, name) for name in (1, 2, 3))
        first.take_turn()
        second.take_turn()
        assert sent.counts["Close"] == 0
        first.take_turn()
        third.take_turn()
        assert sent.counts["Close"] == 1
        first.take_turn()
        assert sent.counts["Open"] == 3
        second.take_turn()
        assert sent.counts["Open"] == 4


def test_one_conversation_may_exceed_the_budget_alone() -> None:
    sent = SentMessages()
    with http_client(new_station(), sent, cache_tokens=1) as client:
        program = Program(client, 1)
        for _ in range(3):
            program.take_turn()
        assert (sent.counts["Open"], sent.counts["Close"]) == (1, 0)
        Program(client, 2).take_turn()
        assert (sent.counts["Open"], sent.counts["Close"]) == (2, 1)


def test_no_more_sessions_are_open_than_the_base_station_allows() -> None:
    sent = SentMessages()
    with http_client(new_station(max_sessions=2), sent) as client:
        programs = [Program(client, name) for name in (1, 2, 3)]
        for _ in range(2):
            for program in programs:
                program.take_turn()
        assert sent.counts["Open"] - sent.counts["Close"] == 2


def test_an_echo_with_log_probabilities_takes_the_place_of_the_least_recently_used_conversation() -> None:
    sent = SentMessages()
    with http_client(new_station(max_sessions=2), sent) as client:
        programs = [Program(client, name) for name in (1, 2)]
        for program in programs:
            program.take_turn()
        fields = {"prompt": "3 1 4 1 5", "echo": True, "logprobs": 1, "max_tokens": 0}
        assert client.post("/v1/completions", json=fields).status_code == 200
        assert (sent.counts["Open"], sent.counts["Close"]) == (3, 2)
        programs[1].take_turn()
    assert (sent.counts["Open"], sent.counts["Extend"]) == (3, 1)


def test_conversations_go_on_after_the_connection_was_lost() -> None:
    lost = [False]
    with http_client(new_station(), lambda _: not lost[0]) as client:
        programs = [Program(client, name) for name in (1, 2)]
        for program in programs:
            program.take_turn()
        lost[0] = True
        assert complete(client).status_code == 503
        lost[0] = False
        for program in programs:
            program.take_turn()


def test_a_conversation_goes_on_behind_a_stop_string() -> None:
    sent = SentMessages()
    stop = text_of(target_alone(TARGET, PROMPT, 12)[4:6]).strip()
    with http_client(new_station(), sent) as client:
        answer = complete(client, stop=[stop])
        kept = [int(word) for word in content_of(answer).split()]
        assert len(kept) < 6
        second = complete(client, messages=next_turn(answer))
    assert content_of(second) == text_of(target_alone(TARGET, [*PROMPT, *kept, 9, 2, 6], 12))
    assert sent.counts["Open"] == 1


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("5 " * 5000, {}),
        ("5 " * 120, {}),
        ("5", {"stop_token_ids": [99]}),
        ("5", {"logit_bias": {"99": 1}}),
        ("5", {"regex": "("}),
        ("5", {"edgedraft": {"draft_len": 500}}),
    ],
    ids=["context", "prompt", "stop", "bias", "grammar", "draft"],
)
def test_a_request_that_is_refused_ends_no_conversation(text: str, fields: dict[str, Any]) -> None:
    sent = SentMessages()
    with http_client(new_station(max_sessions=2, max_prompt_len=100), sent) as client:
        programs = [Program(client, name) for name in (1, 2)]
        for program in programs:
            program.take_turn()
        refused = [programs[0].ask(text, **fields), Program(client, 3, []).ask(text, **fields)]
        assert [response.status_code for response in refused] == [400, 400]
        for program in programs:
            program.take_turn()
    assert (sent.counts["Open"], sent.counts["Extend"], sent.counts["Close"]) == (2, 2, 2)


class FaultingTransport(MemoryTransport):
    """Answers the Draft of one session with a Fault that ends it."""

    def receive(self, timeout: float) -> bytes | None:
        frame = super().receive(timeout)
        message = None if frame is None else self.station.codec.decode(frame)
        if isinstance(message, Verdict) and message.session_id == 1:
            return self.station.codec.encode(Fault(1, "non_finite", "the target's logits are NaN or infinite"))
        return frame


def test_a_fault_that_ends_one_session_leaves_the_other_conversations_and_the_connection(run: list[int]) -> None:
    station, sent = new_station(), SentMessages()
    with http_client(station, sent, transport=FaultingTransport(station, up=sent)) as client:
        program = Program(client, name=1)
        program.take_turn()
        refused = complete(client, messages=[{"role": "user", "content": "8 8 8 8"}])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "non_finite")
        assert client.get("/readyz").status_code == 200
        program.take_turn()
    assert sent.counts["Hello"] == 1
    assert sent.counts["Open"] == 2
    assert sent.counts["Extend"] == 1


def test_a_refused_request_leaves_the_settings_of_its_conversation() -> None:
    station, model = new_station(), FakeDraftModel.make(DRAFT)
    client, tokenizer = join(station, model)[0], cast(Tokenizer, NumberTokenizer())
    conversations = Conversations(model, tokenizer, 4096, Planners(model.manifest.quality))
    first, other = settings(Sampling()), settings(Sampling(seed=7))
    with conversations.for_prompt(client, PROMPT, first) as conversation:
        list(conversation.ask(PROMPT, NEW_TOKENS))
    too_long = [*PROMPT, *[5] * 5000]
    with pytest.raises(ContextLengthError), conversations.for_prompt(client, too_long, other):
        pass
    assert conversation.settings == first
