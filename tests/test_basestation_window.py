"""Several Drafts in flight: the answer does not change, and invalidated Drafts cost no forward pass."""

import random
from collections.abc import Sequence
from typing import cast

import pytest

from basestation.target.target_model import TargetModel
from device.drafting.sampling import sparse_distribution
from device.settings import UplinkSettings
from protocol.limits import Limits
from protocol.messages import Draft, Fault, Message, Mode, Open, Opened, Sampling, Verdict
from protocol.randomness import Stream, random_bits
from protocol.sparse import SparseDistribution
from tests.fakes import TARGET, VOCAB, FakeTarget, blend, next_logits, random_table, target_alone
from tests.link_pair import Station
from tests.raw_device import RawDevice

DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.8)
PROMPT = (3, 1, 4, 1)
OWN = target_alone(TARGET, PROMPT, 40)
GREEDY, SAMPLED = Sampling(), Sampling(0.9, seed=7)


def opened(sampling: Sampling = GREEDY, mode: Mode = Mode.IDS) -> tuple[RawDevice, FakeTarget]:
    target = FakeTarget(TARGET)
    device = RawDevice(Station(cast(TargetModel, target)))
    assert device.request(Open(0, 0, mode, sampling, PROMPT)) == Opened(0, 0)
    device.station.engine.step()
    target.passes.clear()
    return device, target


def send(device: RawDevice, *messages: Message) -> None:
    """Send all before any is verified."""
    for message in messages:
        device.station.push(device.peer, device.station.codec.encode(message))


def other_than(token_id: int) -> int:
    return (token_id + 1) % VOCAB


def replies_of(device: RawDevice) -> list[Message]:
    return list(iter(device.receive, None))


def test_drafts_on_right_assumptions_are_all_verified() -> None:
    device, target = opened()
    send(device, Draft(0, 1, tuple(OWN[:3])), Draft(0, 2, tuple(OWN[4:6]), assumed_bonus=OWN[3]))
    send(device, Draft(0, 3, (OWN[7], OWN[0]), assumed_bonus=OWN[6]))
    assert replies_of(device) == [Verdict(0, 1, 3, OWN[3]), Verdict(0, 2, 2, OWN[6]), Verdict(0, 3, 1, OWN[8])]
    assert len(target.passes) == 3


@pytest.mark.parametrize(
    ("first", "assumed_bonus"),
    [((OWN[0], other_than(OWN[1])), OWN[2]), ((OWN[0], OWN[1]), other_than(OWN[2]))],
    ids=["a rejected token", "another bonus token"],
)
def test_drafts_on_a_wrong_assumption_cost_no_forward_pass(first: tuple[int, int], assumed_bonus: int) -> None:
    device, target = opened()
    send(device, Draft(0, 1, first), Draft(0, 2, (1,), assumed_bonus=assumed_bonus), Draft(0, 3, (2,), assumed_bonus=5))
    (verdict,) = replies_of(device)
    assert isinstance(verdict, Verdict)
    assert len(target.passes) == 1
    send(
        device, Draft(0, 2, (1,), assumed_bonus=assumed_bonus), Draft(0, 3, (2,), assumed_bonus=5)
    )  # resent: still invalidated
    assert (replies_of(device), len(target.passes)) == ([], 1)
    end = verdict.accepted + 1
    assert device.request(Draft(0, 4, (OWN[end],))) == Verdict(0, 4, 1, OWN[end + 1])


def test_an_invalidated_draft_that_arrives_late_is_not_answered() -> None:
    device, target = opened()
    assert device.request(Draft(0, 1, (OWN[0],))) == Verdict(0, 1, 1, OWN[1])
    assert device.request(Draft(0, 2, (OWN[3],), assumed_bonus=other_than(OWN[1]))) is None
    assert device.request(Draft(0, 3, (OWN[2],))) == Verdict(0, 3, 1, OWN[3])
    assert len(target.passes) == 2


def test_every_draft_of_a_window_gets_its_stored_verdict_again() -> None:
    device, target = opened()
    drafts = [
        Draft(0, 1, (OWN[0],)),
        Draft(0, 2, (OWN[2],), assumed_bonus=OWN[1]),
        Draft(0, 3, (OWN[4],), assumed_bonus=OWN[3]),
    ]
    send(device, *drafts)
    verdicts = replies_of(device)
    assert len(verdicts) == 3
    for draft, verdict in zip(drafts, verdicts, strict=True):
        assert device.request(draft) == verdict
    assert len(target.passes) == 3


def test_more_drafts_than_the_window_end_the_session() -> None:
    device, _ = opened()
    drafts = [Draft(0, 2 + index, (), assumed_bonus=OWN[index]) for index in range(Limits.window)]
    send(device, Draft(0, 1, ()), *drafts)
    fault = next(message for message in replies_of(device) if isinstance(message, Fault))
    assert (fault.session_id, fault.code) == (0, "state")
    assert f"{Limits.window + 1} Drafts in flight; allowed: {Limits.window} (--window)" in fault.text


class PipeliningDevice:
    """Drafts ahead over a link that loses messages.

    Attributes:
        answer: the committed tokens after the prompt.
    """

    def __init__(self, device: RawDevice, mode: Mode, sampling: Sampling) -> None:
        self.device, self.mode, self.sampling = device, mode, sampling
        self.answer: list[int] = []

    def draft(self, tokens: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[SparseDistribution, ...]]:
        """Drafted tokens and the distributions they were sampled from; greedy tokens in modes that send ids alone."""
        drafted: list[int] = []
        distributions: list[SparseDistribution] = []
        for _ in range(count):
            logits = next_logits(DRAFT, [*tokens, *drafted])
            if self.mode.sends_ids_alone:
                drafted.append(int(logits.argmax()))
                continue
            distributions.append(sparse_distribution(logits, self.sampling, UplinkSettings(4, 1.0, 96)))
            position = len(tokens) + len(drafted)
            drafted.append(distributions[-1].sample(random_bits(self.sampling.seed, position, Stream.DRAFT)))
        return tuple(drafted), tuple(distributions)

    def run(self, length: int, window: int, rng: random.Random, loss: float) -> None:
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
                drafted, distributions = self.draft(tokens, 2)
                in_flight.append(Draft(0, next_round, drafted, distributions, assumed_bonus))
                ahead += drafted
                next_round += 1
            for draft in in_flight:  # resend all unanswered Drafts
                if rng.random() > loss:
                    send(self.device, draft)
            for reply in replies_of(self.device):
                assert isinstance(reply, Verdict)
                if in_flight and reply.round_id == in_flight[0].round_id and rng.random() > loss:
                    done = in_flight.pop(0)
                    self.answer += [*done.token_ids[: reply.accepted], reply.token_id]
                    all_accepted = reply.accepted == len(done.token_ids)
                    if not (all_accepted and in_flight and in_flight[0].assumed_bonus == reply.token_id):
                        in_flight.clear()
                    ahead = [token for draft in in_flight for token in ((draft.assumed_bonus or 0), *draft.token_ids)][
                        1:
                    ]
        raise AssertionError("the answer is not finished")


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("loss", [0, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_a_device_that_drafts_ahead_gets_the_targets_own_answer(window: int, loss: float, seed: int) -> None:
    device, _ = opened()
    pipelining = PipeliningDevice(device, Mode.IDS, GREEDY)
    pipelining.run(30, window, random.Random(seed), loss)  # noqa: S311
    assert pipelining.answer[:30] == OWN[:30]


@pytest.mark.parametrize("seed", range(5))
def test_losses_change_no_sampled_answer(seed: int) -> None:
    answers = []
    for loss in (0.0, 0.4):
        device, _ = opened(SAMPLED, Mode.TOPK)
        pipelining = PipeliningDevice(device, Mode.TOPK, SAMPLED)
        pipelining.run(30, 3, random.Random(seed), loss)  # noqa: S311
        answers.append(pipelining.answer[:30])
    assert answers[0] == answers[1]
