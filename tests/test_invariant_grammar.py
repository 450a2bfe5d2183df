"""Grammars hold on both ends: the answer is the target's own under the same grammar (invariant 3)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer

from basestation.verification import logits_processing
from common.grammar import GrammarCompiler, lark_grammar, regex_grammar, schema_grammar
from device.session.session import DeviceSession
from device.settings import DraftSettings
from protocol.errors import GrammarError, SettingsError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Close, Draft, Fault, Message, Mode, Open, Opened, Sampling, Verdict, Welcome
from tests.fakes import FakeDraftModel, FakeTarget, blend, next_logits, random_table
from tests.invariants import token_ids_of
from tests.json_tokens import COMPILER, PIECES, STOP, text_of
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session
from tests.raw_device import hello

VOCAB = len(PIECES)
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
PROMPTS = [np.random.default_rng(seed).integers(0, VOCAB, 3 + seed).tolist() for seed in range(6)]
ITEM = {"type": "object", "properties": {"a": {"enum": ["b", 1, None]}, "c": {"type": "boolean"}}, "required": ["a"]}
GRAMMARS = {
    "object": schema_grammar({**ITEM, "additionalProperties": False}),
    "list": schema_grammar({"type": "array", "items": {**ITEM, "additionalProperties": False}, "maxItems": 3}),
    "lark": lark_grammar('start: "abc" ("x" | "a")+ "cba"'),
    "regex": regex_grammar("[abc]{3,9}x"),
}
every_grammar = pytest.mark.parametrize("text", GRAMMARS.values(), ids=GRAMMARS)


def new_station() -> Station:
    return Station(FakeTarget.make(TARGET, frozenset({STOP}), grammar_compiler=COMPILER))


def session_of(
    settings: DraftSettings, prompt: Sequence[int], transport: MemoryTransport | None = None, masked: bool = True
) -> tuple[DeviceSession, FakeDraftModel]:
    """A session, and its draft model; the device drafts without the grammar unless ``masked``."""
    model = FakeDraftModel.make(DRAFT, (STOP,))
    transport = transport or MemoryTransport(new_station())
    client, _ = join(transport.station, model, transport)
    grammar = COMPILER.compile(settings.sampling.grammar) if settings.sampling.grammar and masked else None
    session = open_session(client, settings, model, list(prompt), grammar=grammar)
    return session, model  # type: ignore[return-value]


def slow_answer(text: str, prompt: Sequence[int]) -> list[int]:
    """The target's greedy answer: the likeliest token that keeps the answer in the grammar, tried one by one."""
    return list(_slow_answer(text, tuple(prompt)))


@cache
def _slow_answer(text: str, prompt: tuple[int, ...]) -> list[int]:
    answer, compiled = list[int](), COMPILER.compile(text)
    while len(answer) < 60 and STOP not in answer:
        ranked = np.argsort(-next_logits(TARGET, [*prompt, *answer]), kind="stable").tolist()
        answer.append(next(token for token in ranked if compiled.copy().follow([*answer, token])))
    return answer


@pytest.mark.parametrize("mode", Mode)
@every_grammar
def test_greedy_answers_are_those_of_the_slow_twin(mode: Mode, text: str) -> None:
    for index, prompt in enumerate(PROMPTS):
        settings = DraftSettings(mode, Sampling(grammar=text), 4, [4, None, 8][index % 3], drafts_ahead=index % 3)
        assert token_ids_of(session_of(settings, prompt)[0], 60) == slow_answer(text, prompt)


@every_grammar
def test_coupled_answers_are_the_targets_own_with_the_same_seed(text: str) -> None:
    for seed, prompt in enumerate(PROMPTS):
        sampling = Sampling(1.0, seed=seed, top_p=0.9, grammar=text)
        alone = token_ids_of(session_of(DraftSettings(Mode.TARGET, sampling, 4, None), prompt)[0], 60)
        for draft_len, ahead in ((4, 0), (8, 2)):
            settings = DraftSettings(Mode.COUPLED, sampling, 4, draft_len, drafts_ahead=ahead)
            assert token_ids_of(session_of(settings, prompt)[0], 60) == alone


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL, Mode.COUPLED])
def test_finished_answers_follow_the_schema(mode: Mode) -> None:
    finished = 0
    for seed, prompt in enumerate(PROMPTS):
        sampling = Sampling(1.0, seed=seed, grammar=GRAMMARS["object"])
        answer = token_ids_of(session_of(DraftSettings(mode, sampling, 4, 4), prompt)[0], 60)
        if answer[-1] == STOP:
            value = json.loads(text_of(answer))
            assert value["a"] in ("b", 1, None)
            assert set(value) <= {"a", "c"}
            finished += 1
    assert finished > len(PROMPTS) // 2


@every_grammar
def test_a_base_station_that_restarts_continues_the_answer(text: str) -> None:
    transport = MemoryTransport(new_station())
    session, _ = session_of(DraftSettings(Mode.IDS, Sampling(grammar=text), 4, 4), PROMPTS[1], transport)
    tokens = session.answer(60)
    answer = [next(tokens).token_id for _ in range(3)]
    transport.station = new_station()
    assert [*answer, *(token.token_id for token in tokens)] == slow_answer(text, PROMPTS[1])


def test_the_next_turn_may_have_another_grammar_or_none() -> None:
    session, _ = session_of(IDS, PROMPTS[0])
    for text in (*GRAMMARS.values(), GRAMMARS["list"], GRAMMARS["list"]):
        prompt = [*session.tokens, 1, 2]
        session.extend(prompt, Sampling(grammar=text), grammar=COMPILER.compile(text))
        assert token_ids_of(session, 60) == slow_answer(text, prompt)


def test_forced_tokens_are_drafted_without_the_draft_model() -> None:
    text = lark_grammar('start: "abcxabcxabcxabcxabcx"')
    session, model = session_of(DraftSettings(Mode.IDS, Sampling(grammar=text), 4, 8), PROMPTS[0])
    assert text_of(token_ids_of(session, 60)) == "abcx" * 5
    assert session.counters.accepted == session.counters.drafted
    assert len(model.passes) <= 3 < session.counters.drafted


@every_grammar
def test_a_masked_draft_is_accepted_at_least_as_often(text: str) -> None:
    rates = []
    for masked in (True, False):
        accepted = drafted = 0
        for prompt in PROMPTS:
            session, _ = session_of(DraftSettings(Mode.IDS, Sampling(grammar=text), 4, 4), prompt, masked=masked)
            assert token_ids_of(session, 60) == slow_answer(text, prompt)
            accepted, drafted = accepted + session.counters.accepted, drafted + session.counters.drafted
        rates.append(accepted / drafted)
    assert rates[0] > rates[1]


def test_a_base_station_without_grammars_refuses_them_by_name() -> None:
    station = Station(FakeTarget.make(TARGET, frozenset({STOP})))
    settings = DraftSettings(Mode.IDS, Sampling(grammar=GRAMMARS["list"]), 4, 4)
    with pytest.raises(SettingsError, match=r"grammar is .*: this base station has no grammars"):
        session_of(settings, PROMPTS[0], MemoryTransport(station))
    fault = replies(station, hello(VOCAB), Open(0, 0, Mode.IDS, settings.sampling, (1,)))[-1]
    assert isinstance(fault, Fault)
    assert (fault.code, "llguidance" in fault.text) == (GrammarError.code, True)


def test_a_grammar_longer_than_the_limit_is_refused_on_both_ends() -> None:
    limits = Limits(max_grammar_len=100)
    station = Station(FakeTarget.make(TARGET, frozenset({STOP}), grammar_compiler=COMPILER), limits)
    settings = DraftSettings(Mode.IDS, Sampling(grammar=GRAMMARS["list"]), 4, 4)
    with pytest.raises(SettingsError, match=r"at most 100 bytes \(the base station's --max-grammar-len\)"):
        session_of(settings, PROMPTS[0], MemoryTransport(station))
    frame = FrameCodec(VOCAB).encode(Open(0, 0, Mode.IDS, settings.sampling, (1,)))
    station.push(b"a", frame)
    fault = station.outboxes[b"a"].pop()
    assert isinstance(fault, Fault)
    assert "--max-grammar-len of 100" in fault.text


@pytest.mark.parametrize("values", [{"min_tokens": 3}, {"ignore_eos": True}], ids=str)
def test_settings_that_contradict_the_end_of_a_grammar_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="with a grammar"):
        replace(Sampling(grammar=GRAMMARS["list"]), **values)


def replies(station: Station, *messages: Message) -> list[Message]:
    """What a base station answers to a device that sends these messages."""
    received = []
    for message in messages:
        station.push(b"a", FrameCodec(VOCAB).encode(message))
        while (reply := station.pull(b"a")) is not None:
            received.append(reply)
    return received


class Elsewhere:
    """Another thread that does its work when it is told to."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def __call__(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        self.tasks.append((work, then))

    def finish(self) -> None:
        for work, then in self.tasks:
            work()
            then()
        self.tasks.clear()


def station_with(elsewhere: Elsewhere) -> Station:
    target = FakeTarget.make(TARGET, frozenset({STOP}), grammar_compiler=COMPILER)
    return Station(target, run_elsewhere=elsewhere)


def open_with(text: str, session_id: int = 0) -> Open:
    return Open(session_id, 0, Mode.IDS, Sampling(grammar=text), (1, 2))


def test_a_session_opens_once_its_grammar_is_compiled_elsewhere_and_others_do_not_wait() -> None:
    elsewhere = Elsewhere()
    station = station_with(elsewhere)
    opening = open_with(GRAMMARS["list"])
    assert [type(one) for one in replies(station, hello(VOCAB), opening, opening)] == [Welcome]
    other = replies(station, replace(opening, session_id=1, sampling=Sampling()), Draft(1, 1, ()))
    assert [type(one) for one in other] == [Opened, Verdict]
    assert len(elsewhere.tasks) == 1
    elsewhere.finish()
    assert [type(one) for one in replies(station, Draft(0, 1, ()))] == [Opened, Verdict]
    assert [type(one) for one in replies(station, replace(opening, session_id=2))] == [Opened]


def test_a_device_compiles_one_grammar_at_a_time_and_an_invalid_one_ends_its_session_alone() -> None:
    elsewhere = Elsewhere()
    station = station_with(elsewhere)
    first = replies(station, hello(VOCAB), open_with("{"), open_with(GRAMMARS["list"], 1))
    assert [getattr(one, "code", "") for one in first] == ["", "full"]
    elsewhere.finish()
    fault = station.pull(b"a")
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (0, GrammarError.code)
    assert replies(station, open_with("{", 2))[0] == replace(fault, session_id=2)


def test_a_session_that_is_closed_while_its_grammar_is_compiled_does_not_open() -> None:
    elsewhere = Elsewhere()
    station = station_with(elsewhere)
    replies(station, hello(VOCAB), open_with(GRAMMARS["list"]), Close(0))
    elsewhere.finish()
    assert station.pull(b"a") is None


def test_sessions_of_a_device_wait_for_the_same_grammar_and_one_that_closes_leaves_the_others() -> None:
    elsewhere = Elsewhere()
    station = station_with(elsewhere)
    replies(station, hello(VOCAB), *(open_with(GRAMMARS["list"], index) for index in range(3)), Close(1))
    assert len(elsewhere.tasks) == 1
    elsewhere.finish()
    assert [one.session_id for one in replies(station, Draft(0, 1, ())) if isinstance(one, Opened)] == [0, 2]


def test_what_waits_for_a_grammar_is_bounded() -> None:
    prompt = (1,) * 1000
    for limits, most in ((Limits(max_held_bytes=100_000), 2), (Limits(max_sessions=100), 16)):
        elsewhere = Elsewhere()
        target = FakeTarget.make(TARGET, frozenset({STOP}), grammar_compiler=COMPILER)
        station = Station(target, limits, run_elsewhere=elsewhere)
        openings = [replace(open_with(GRAMMARS["list"], index), prompt_ids=prompt) for index in range(20)]
        refused = replies(station, hello(VOCAB), *openings, *openings[:most])[1:]
        assert [getattr(one, "code", "") for one in refused] == ["full"] * (20 - most)


def test_the_answer_so_far_of_a_reopened_session_is_followed_elsewhere() -> None:
    elsewhere = Elsewhere()
    station = station_with(elsewhere)
    text, prompt = GRAMMARS["regex"], tuple(PROMPTS[0])
    answer = tuple(slow_answer(text, prompt))
    opening = Open(0, 0, Mode.IDS, Sampling(grammar=text), (*prompt, *answer[:2]), 2)
    replies(station, hello(VOCAB), opening)
    elsewhere.finish()
    followed = replies(station, Draft(0, 1, answer[2:4]))
    assert [type(one) for one in followed] == [Opened, Verdict]
    assert isinstance(followed[1], Verdict)
    assert (followed[1].accepted, followed[1].token_id) == (2, answer[4])
    again = replies(station, replace(opening, session_id=1))
    assert (again, len(elsewhere.tasks)) == ([], 1)


def test_a_grammar_that_was_refused_is_not_compiled_again() -> None:
    elsewhere = Elsewhere()
    station = station_with(elsewhere)
    openings = [replace(open_with("{", index), answer_len=index % 2) for index in (1, 2, 3)]
    replies(station, hello(VOCAB), openings[0])
    elsewhere.finish()
    assert [getattr(one, "code", "") for one in replies(station, *openings[1:])] == [GrammarError.code] * 3
    assert elsewhere.tasks == []


def test_an_answer_that_takes_the_grammar_too_long_is_refused_before_a_forward_pass() -> None:
    station = new_station()
    ambiguous = Sampling(grammar=lark_grammar('start: s\ns: s s | "a"'))
    opening = Open(0, 0, Mode.IDS, ambiguous, (1, *[PIECES.index("a")] * 3000), 3000)
    fault = replies(station, hello(VOCAB), opening)[-1]
    assert isinstance(fault, Fault)
    assert (fault.code, "cannot be applied" in fault.text) == (GrammarError.code, True)


def test_a_round_that_takes_the_grammar_too_long_ends_its_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_processing, "_GRAMMAR_SECONDS", 0.0)
    station = new_station()
    plain = replace(open_with(""), session_id=1)
    replies(station, hello(VOCAB), open_with(GRAMMARS["list"]), plain)
    received = replies(station, Draft(0, 1, ()), Draft(1, 1, ()))
    assert [type(one) for one in received] == [Fault, Verdict]
    assert isinstance(received[0], Fault)
    assert (received[0].session_id, received[0].code) == (0, GrammarError.code)
    assert "takes more than" in received[0].text


def test_a_compiler_that_fails_otherwise_ends_the_session_alone() -> None:
    def no_tokenizer() -> LLTokenizer:
        raise RuntimeError("no byte fallback")

    compiler = GrammarCompiler(no_tokenizer, VOCAB)
    station = Station(FakeTarget.make(TARGET, frozenset({STOP}), grammar_compiler=compiler))
    received = replies(station, hello(VOCAB), open_with(GRAMMARS["list"]), open_with("", 1))
    assert [type(one) for one in received] == [Welcome, Fault, Opened]
    assert isinstance(received[1], Fault)
    assert received[1].code == GrammarError.code


def test_a_tokenizer_that_llguidance_cannot_use_is_named() -> None:
    compiler = GrammarCompiler.of_tokenizer("{}", VOCAB, frozenset({STOP}))
    with pytest.raises(GrammarError, match=r"cannot use this model's tokenizer: ."):
        compiler.compile(GRAMMARS["list"])
