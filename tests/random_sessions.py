"""Random sessions over a link that breaks: every answer must be the target's own.

Settings, turns and breaks are drawn from a seed. At temperature 0 and in mode
``coupled`` the reference is the target alone, in a new session for each turn. In the
other modes, whose answers are the target's in distribution and depend on the drafts,
it is the same conversation with one Draft at a time over a link that does not break.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.prompts import OWN_PROMPTS
from device.session.session import DeviceSession
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling
from tests.relay import CountingRelay, port_of

AT_ONCE = 4
"""Sessions at the same time: each is a neighbor of the others in the base station's passes."""
BREAK_CHANCE = 0.2
"""Of an answer: the link breaks at one of its tokens."""
DRAWN_FROM_TARGET = (Mode.TARGET, Mode.COUPLED)
"""Modes whose sampled answer is, token for token, what the target alone samples with the same seed."""


def _random_sampling(draw: random.Random, mode: Mode) -> Sampling:
    if mode is Mode.IDS or draw.random() < 0.2:
        return Sampling()
    return Sampling(
        temperature=draw.choice([0.3, 0.7, 1.0, 1.3]),
        top_k=draw.choice([0, 0, 1, 20, 5000]),
        top_p=draw.choice([1.0, 1.0, 0.95, 0.5]),
        seed=draw.getrandbits(32),
    )


def _random_settings(draw: random.Random) -> DraftSettings:
    mode = draw.choice(list(Mode))
    sampling = _random_sampling(draw, mode)
    fixed = [1, 2, 3, 4, 6, 8]
    planned = [None] if sampling.greedy or mode in DRAWN_FROM_TARGET else []  # the planner depends on the time
    uplink_k, draft_len = draw.choice([1, 4, 32, 256]), draw.choice([*fixed, *planned])
    ahead, lookup = draw.choice([0, 1, None]), draw.choice([True, False])
    return DraftSettings(mode, sampling, uplink_k, draft_len, drafts_ahead=ahead, lookup=lookup)


class _Reference:
    """What a conversation must answer.

    Args:
        alone: the device on which the target alone answers. Another one than that of the unbroken conversation: two
            conversations would share a draft model, whose logits depend, in their last digits, on what it ran together.
        unbroken: the device of that conversation.
        settings: of the conversation.
    """

    def __init__(self, alone: BenchSetup, unbroken: BenchSetup, settings: DraftSettings) -> None:
        self._alone = alone
        self._unbroken = unbroken.conversation(replace(settings, drafts_ahead=0))

    def answers(self, prompt: list[int], count: int, settings: DraftSettings) -> Iterator[list[int]]:
        if settings.sampling.greedy or settings.mode in DRAWN_FROM_TARGET:
            yield self._alone.answer(prompt, count, replace(settings, mode=Mode.TARGET)).token_ids
        if settings.mode.encoding:
            self._unbroken.settings = replace(settings, drafts_ahead=0)
            yield [token.token_id for token in self._unbroken.begin(prompt).answer(count)]

    def close(self) -> None:
        self._unbroken.close()


def _turns(draw: random.Random, setup: BenchSetup) -> list[list[int]]:
    """The tokens that each turn adds: mostly one or two, sometimes a long one."""
    first = setup.prompt_ids(draw.choice(OWN_PROMPTS), draw.choice([1, 7, 30, 200]))
    more = [
        setup.tokenizer.encode(f" {draw.choice(OWN_PROMPTS)}")[: draw.choice([1, 12])] for _ in range(draw.randrange(3))
    ]
    return [first, *more]


def _tokens_of(session: DeviceSession, count: int, relay: CountingRelay, break_at: int | None) -> list[int]:
    tokens: list[int] = []
    for token in session.answer(count):
        if len(tokens) == break_at:
            relay.drop_connections()
        tokens.append(token.token_id)
    return tokens


@contextmanager
def _relayed(bundle: Path, address: str) -> Iterator[tuple[BenchSetup, CountingRelay]]:
    with (
        CountingRelay(port_of(address)) as relay,
        bench_setup(bundle, f"tcp://127.0.0.1:{relay.port}") as setup,
    ):
        yield setup, relay


def check_random_sessions(bundle: Path, address: str, sessions: int) -> Counter[str]:
    """Compare the answers of random sessions, several at once, with those of the base station at ``address``.

    Returns:
        The answers, those with a break of the link, and the conversations of each mode.

    Raises:
        AssertionError: an answer differs.
    """
    parts = [range(first, sessions, AT_ONCE) for first in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(lambda numbers: _check_sessions(bundle, address, numbers), parts), Counter[str]())


def _check_sessions(bundle: Path, address: str, numbers: Iterable[int]) -> Counter[str]:
    seen: Counter[str] = Counter()
    with (
        _relayed(bundle, address) as (setup, relay),
        bench_setup(bundle, address) as alone,
        bench_setup(bundle, address) as unbroken,
    ):
        for number in numbers:
            draw = random.Random(number)  # noqa: S311 - not a secret
            settings = _random_settings(draw)
            conversation, reference = setup.conversation(settings), _Reference(alone, unbroken, settings)
            tokens: list[int] = []
            for added in _turns(draw, setup):
                tokens += added
                count = draw.randrange(1, 32)
                break_at = draw.randrange(count) if draw.random() < BREAK_CHANCE else None
                answer = _tokens_of(conversation.begin(tokens), count, relay, break_at)
                for expected in reference.answers(tokens, count, conversation.settings):
                    assert answer == expected, f"session {number}, {conversation.settings}, break at {break_at}"
                seen.update(answers=1, breaks=break_at is not None)
                seen[settings.mode] += 1
                tokens = [*tokens, *answer]
                if draw.random() < 0.3:
                    sampling = _random_sampling(draw, settings.mode)
                    if settings.draft_len or settings.mode in DRAWN_FROM_TARGET or sampling.greedy:
                        conversation.settings = replace(settings, sampling=sampling)
            conversation.close()
            reference.close()
    return seen
