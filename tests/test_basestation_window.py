"""Several Drafts under way: the answer is that of one after the other, and void Drafts cost no pass."""

import random
from collections.abc import Sequence
from typing import cast

import pytest

from basestation.target_model import TargetModel
from device.sampling import Uplink, draft_distribution
from protocol.limits import Limits
from protocol.messages import Draft, Fault, Message, Mode, Open, Opened, Sampling, Verdict
from protocol.randomness import Stream, random_bits
from protocol.sparse import SparseDistribution
from tests.fakes import FakeTarget, blend, next_logits, random_table, target_alone
from tests.link_pair import Station
from tests.raw_device import RawDevice

VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.8)
PROMPT = (3, 1, 4, 1)
OWN = target_alone(TARGET, PROMPT, 40)
GREEDY, SAMPLED = Sampling(), Sampling(0.9, seed=7)


def opened(sampling: Sampling = GREEDY, mode: Mode = Mode.IDS) -> tuple[RawDevice, FakeTarget]:
    target = FakeTarget(TARGET)
    device = RawDevice(Station(cast(TargetModel, target)))
    assert device.say(Open(0, 0, mode, sampling, PROMPT)) == Opened(0, 0)
    device.station.engine.step()
    target.passes.clear()
    return device, target


def send(device: RawDevice, *messages: Message) -> None:
    """Send all before any is judged."""
    for message in messages:
        device.station.push(device.peer, device.station.codec.encode(message))


def other_than(token_id: int) -> int:
    return (token_id + 1) % VOCAB


def heard(device: RawDevice) -> list[Message]:
    return list(iter(device.hear, None))


def test_drafts_on_right_guesses_are_all_judged() -> None:
    device, target = opened()
    send(device, Draft(0, 1, tuple(OWN[:3])), Draft(0, 2, tuple(OWN[4:6]), assumed_bonus=OWN[3]))
    send(device, Draft(0, 3, (OWN[7], OWN[0]), assumed_bonus=OWN[6]))
    assert heard(device) == [Verdict(0, 1, 3, OWN[3]), Verdict(0, 2, 2, OWN[6]), Verdict(0, 3, 1, OWN[8])]
    assert len(target.passes) == 3


@pytest.mark.parametrize(
    ("first", "assumed_bonus"),
    [((OWN[0], other_than(OWN[1])), OWN[2]), ((OWN[0], OWN[1]), other_than(OWN[2]))],
    ids=["a rejected token", "another token than pipelined"],
)
def test_what_builds_on_a_wrong_guess_is_void_without_a_pass(first: tuple[int, int], assumed_bonus: int) -> None:
    device, target = opened()
    send(device, Draft(0, 1, first), Draft(0, 2, (1,), assumed_bonus=assumed_bonus), Draft(0, 3, (2,), assumed_bonus=5))
    (verdict,) = heard(device)
    assert isinstance(verdict, Verdict)
    assert len(target.passes) == 1
    send(
        device, Draft(0, 2, (1,), assumed_bonus=assumed_bonus), Draft(0, 3, (2,), assumed_bonus=5)
    )  # repeated: void as ever
    assert (heard(device), len(target.passes)) == ([], 1)
    end = verdict.accepted + 1
    assert device.say(Draft(0, 4, (OWN[end],))) == Verdict(0, 4, 1, OWN[end + 1])


def test_a_void_draft_that_comes_late_is_not_answered() -> None:
    device, target = opened()
    assert device.say(Draft(0, 1, (OWN[0],))) == Verdict(0, 1, 1, OWN[1])
    assert device.say(Draft(0, 2, (OWN[3],), assumed_bonus=other_than(OWN[1]))) is None
    assert device.say(Draft(0, 3, (OWN[2],))) == Verdict(0, 3, 1, OWN[3])
    assert len(target.passes) == 2


def test_every_draft_of_a_window_gets_its_stored_verdict_again() -> None:
    device, target = opened()
    drafts = [
        Draft(0, 1, (OWN[0],)),
        Draft(0, 2, (OWN[2],), assumed_bonus=OWN[1]),
        Draft(0, 3, (OWN[4],), assumed_bonus=OWN[3]),
    ]
    send(device, *drafts)
    verdicts = heard(device)
    assert len(verdicts) == 3
    for draft, verdict in zip(drafts, verdicts, strict=True):
        assert device.say(draft) == verdict
    assert len(target.passes) == 3


def test_more_drafts_than_the_window_end_the_session() -> None:
    device, _ = opened()
    drafts = [Draft(0, 2 + place, (), assumed_bonus=OWN[place]) for place in range(Limits.window)]
    send(device, Draft(0, 1, ()), *drafts)
    fault = next(message for message in heard(device) if isinstance(message, Fault))
    assert (fault.session_id, fault.code) == (0, "state")
    assert f"{Limits.window + 1} Drafts under way; allowed: {Limits.window} (--window)" in fault.text


class AheadDevice:
    """Drafts ahead on its own assumed bonus tokens, over a link that loses and delays; committed tokens are its ``answer``."""

    def __init__(self, device: RawDevice, mode: Mode, sampling: Sampling) -> None:
        self.device, self.mode, self.sampling = device, mode, sampling
        self.answer: list[int] = []

    def draft(self, tokens: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[SparseDistribution, ...]]:
        """Tokens that follow, and what each was drawn from; greedy ones in modes of ids alone."""
        drafted: list[int] = []
        drawn: list[SparseDistribution] = []
        for _ in range(count):
            logits = next_logits(DRAFT, [*tokens, *drafted])
            if self.mode.sends_ids_alone:
                drafted.append(int(logits.argmax()))
                continue
            drawn.append(draft_distribution(logits, self.sampling, Uplink(4, 1.0, 96)))
            position = len(tokens) + len(drafted)
            drafted.append(drawn[-1].sample(random_bits(self.sampling.seed, position, Stream.DRAFT)))
        return tuple(drafted), tuple(drawn)

    def run(self, length: int, window: int, chance: random.Random, loss: float) -> None:
        in_flight: list[Draft] = []
        ahead: list[int] = []
        next_round = 1
        for _ in range(50 * length):
            if len(self.answer) >= length:
                return
            while len(in_flight) < window:
                tokens = [*PROMPT, *self.answer, *ahead]
                assumed_bonus = None
                if in_flight:
                    (assumed_bonus,), _ = self.draft(tokens, 1)
                    tokens.append(assumed_bonus)
                    ahead.append(assumed_bonus)
                drafted, drawn = self.draft(tokens, 2)
                in_flight.append(Draft(0, next_round, drafted, drawn, assumed_bonus))
                ahead += drafted
                next_round += 1
            for draft in in_flight:  # all that is not answered yet, again
                if chance.random() > loss:
                    send(self.device, draft)
            for reply in heard(self.device):
                assert isinstance(reply, Verdict)
                if in_flight and reply.round_id == in_flight[0].round_id and chance.random() > loss:
                    done = in_flight.pop(0)
                    self.answer += [*done.token_ids[: reply.accepted], reply.token_id]
                    stands = reply.accepted == len(done.token_ids)
                    if not (stands and in_flight and in_flight[0].assumed_bonus == reply.token_id):
                        in_flight.clear()
                    ahead = [token for draft in in_flight for token in ((draft.assumed_bonus or 0), *draft.token_ids)][
                        1:
                    ]
        raise AssertionError("the answer does not come to its end")


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("loss", [0, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_a_device_that_drafts_ahead_gets_the_targets_own_answer(window: int, loss: float, seed: int) -> None:
    device, _ = opened()
    ahead = AheadDevice(device, Mode.IDS, GREEDY)
    ahead.run(30, window, random.Random(seed), loss)  # noqa: S311
    assert ahead.answer[:30] == OWN[:30]


@pytest.mark.parametrize("seed", range(5))
def test_losses_change_no_sampled_answer_of_a_window(seed: int) -> None:
    answers = []
    for loss in (0.0, 0.4):
        device, _ = opened(SAMPLED, Mode.TOPK)
        ahead = AheadDevice(device, Mode.TOPK, SAMPLED)
        ahead.run(30, 3, random.Random(seed), loss)  # noqa: S311
        answers.append(ahead.answer[:30])
    assert answers[0] == answers[1]
