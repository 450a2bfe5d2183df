"""Outages of the link at random moments, with Drafts in flight: every answer equals the undisturbed one."""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.prompts import OWN_PROMPTS
from device.drafting.draft_model import DraftModel
from device.planning.planners import Planners
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.messages import Mode, Sampling
from tests.relay import CountingRelay, port_of
from tests.sample import BUNDLE

ANSWERS, DEVICES, TOKENS = 100, 8, 48
OUTAGE_SECONDS = (1, 5, 30)
_UNREACHABLE_PORT = 1

pytestmark = [pytest.mark.model, pytest.mark.endurance]


@dataclass(frozen=True)
class Disturbed:
    """The undisturbed answer, and the outage that begins once ``break_at`` of its tokens have arrived."""

    prompt: str
    settings: DraftSettings
    expected: list[int]
    break_at: int
    seconds: int


def draw_answers(setup: BenchSetup) -> list[Disturbed]:
    draw, answers = random.Random(20261126), list[Disturbed]()  # noqa: S311 - not a secret
    for index in range(ANSWERS):
        mode = (Mode.IDS, Mode.COUPLED)[index % 2]
        sampling = Sampling() if mode is Mode.IDS else Sampling(1.0, seed=draw.getrandbits(32))
        prompt, ahead, draft_len = draw.choice(OWN_PROMPTS), draw.choice([1, None]), draw.choice([4, None])
        alone = DraftSettings(Mode.TARGET, sampling, 1, None)
        expected = setup.answer(setup.prompt_ids(prompt), TOKENS, alone).token_ids
        settings = DraftSettings(mode, sampling, 1, draft_len, drafts_ahead=ahead, lookup=index % 4 < 2)
        outage = draw.randrange(len(expected)), OUTAGE_SECONDS[index % len(OUTAGE_SECONDS)]
        answers.append(Disturbed(prompt, settings, expected, *outage))
    return answers


@contextmanager
def device(station_port: int) -> Iterator[tuple[BenchSetup, CountingRelay]]:
    model = DraftModel(BUNDLE, threads=1)
    planners, tokenizer = Planners(model.manifest.quality), Tokenizer(BUNDLE, model.manifest)
    with (
        CountingRelay(station_port) as relay,
        connected(model, tokenizer, f"tcp://127.0.0.1:{relay.port}", planners) as setup,
    ):
        yield setup, relay


def answer(setup: BenchSetup, relay: CountingRelay, disturbed: Disturbed) -> list[int]:
    session, tokens = setup.session(disturbed.settings, setup.prompt_ids(disturbed.prompt)), list[int]()
    station_port = relay.station_port
    for token in session.answer(TOKENS):
        if len(tokens) == disturbed.break_at:
            relay.station_port = _UNREACHABLE_PORT
            relay.drop_connections()
            threading.Timer(disturbed.seconds, setattr, (relay, "station_port", station_port)).start()
        tokens.append(token.token_id)
    relay.station_port = station_port
    session.close()
    return tokens


def run_device(station_port: int, chosen: Sequence[Disturbed]) -> list[list[int]]:
    with device(station_port) as (setup, relay):
        return [answer(setup, relay, disturbed) for disturbed in chosen]


@pytest.mark.timeout(3600)
def test_outages_of_up_to_30_seconds_change_no_answer(station_address: str, sample_setup: BenchSetup) -> None:
    port, chosen = port_of(station_address), draw_answers(sample_setup)
    shares = [chosen[first::DEVICES] for first in range(DEVICES)]
    with ThreadPoolExecutor(DEVICES) as pool:
        answered = list(pool.map(lambda share: run_device(port, share), shares))
    for share, answers in zip(shares, answered, strict=True):
        for disturbed, tokens in zip(share, answers, strict=True):
            assert tokens == disturbed.expected, disturbed
