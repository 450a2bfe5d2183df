"""A target whose logits are NaN or infinite ends the session that meets them, and no other."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from device.settings import DraftSettings
from protocol.errors import FaultError, NonFiniteError
from protocol.full_distribution import FullDistribution
from protocol.messages import Draft, DraftDistribution, Fault, Message, Mode, Open, Opened, Sampling, Verdict
from protocol.sparse import SparseDistribution
from tests.fakes import TARGET, VOCAB, FakeDraftModel, FakeTarget, Table, next_logits
from tests.link_pair import Station, join, open_session
from tests.raw_device import RawDevice

BAD_PROMPT, PROMPT = (1, 2), (3, 4)
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(0.9, seed=5), "top-k and top-p": Sampling(0.9, 7, 0.8, 5)}
CASES = [(mode, name) for mode, name in product(Mode, SAMPLINGS) if mode is not Mode.IDS or name == "greedy"]


def bad_row(kind: str) -> Any:
    """Logits [VOCAB] that no token can be sampled from."""
    row = TARGET[1, 2].copy()
    if kind == "all -inf":
        row[:] = -np.inf
    elif kind == "all NaN":
        row[:] = np.nan
    else:
        row[5] = np.nan if kind == "NaN" else np.inf
    return row


KINDS = ("NaN", "all NaN", "+inf", "all -inf")


def bad_table(kind: str) -> Table:
    """TARGET, with a bad row after ``BAD_PROMPT``."""
    table = TARGET.copy()
    table[BAD_PROMPT] = bad_row(kind)
    return table


def draft(mode: Mode, sampling: Sampling, round_id: int = 1) -> Draft:
    """A Draft of two tokens as a device in this mode sends it; without tokens in mode ``target``."""
    if mode is Mode.TARGET:
        return Draft(0, round_id, ())
    if mode.sends_ids_alone:
        return Draft(0, round_id, (6, 7))
    probs = np.full(VOCAB, 1 / VOCAB)
    one: DraftDistribution = FullDistribution.quantize(probs)
    if mode is not Mode.FULL:
        one = SparseDistribution.quantize(VOCAB, np.arange(4, 8), probs[:4] / probs[:4].sum(), 96)
    return Draft(0, round_id, (6, 7), (one, one))


def is_non_finite(message: Message | None) -> bool:
    return isinstance(message, Fault) and (message.session_id, message.code) == (0, NonFiniteError.code)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "name"), CASES)
def test_one_session_is_faulted_and_its_neighbour_keeps_its_tokens(mode: Mode, name: str, kind: str) -> None:
    sampling = SAMPLINGS[name]
    station, alone = Station(FakeTarget.make(bad_table(kind))), RawDevice(Station(FakeTarget.make(TARGET)))
    bad, healthy = RawDevice(station), RawDevice(station, b"b")
    for device, prompt in ((bad, BAD_PROMPT), (healthy, PROMPT), (alone, PROMPT)):
        assert device.request(Open(0, 0, mode, sampling, prompt)) == Opened(0, 0)
    request = draft(mode, sampling)
    for peer in (b"a", b"b"):
        station.push(peer, station.codec.encode(request))
    fault, expected = bad.receive(), alone.request(request)
    assert is_non_finite(fault)
    assert isinstance(fault, Fault)
    assert fault.text == "the target's logits are NaN or infinite in the round after 2 tokens of this session"
    assert healthy.receive() == expected
    assert isinstance(expected, Verdict)
    again = bad.request(request)
    assert isinstance(again, Fault)
    assert again.code == "unknown_session"
    for round_id in (2, 3):
        following = draft(mode, sampling, round_id)
        assert healthy.request(following) == alone.request(following)
    assert bad.request(Open(1, 0, mode, sampling, PROMPT)) == Opened(1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_reports_the_fault_after_the_tokens_before_it(kind: str) -> None:
    """The greedy answer is the target's own up to the bad logits, whatever is drafted."""
    table, tokens = TARGET.copy(), [3, 1]
    for _ in range(6):
        tokens.append(int(next_logits(TARGET, tokens).argmax()))
    table[tokens[-2], tokens[-1]] = bad_row(kind)
    expected = tokens[2:]
    for mode in (Mode.IDS, Mode.COUPLED, Mode.TOPK, Mode.FULL, Mode.TARGET):
        model = FakeDraftModel.make(TARGET)
        client, _ = join(Station(FakeTarget.make(table)), model)
        stream = open_session(client, DraftSettings(mode, Sampling(), 4, 1), model, [3, 1]).answer(20)
        assert [next(stream).token_id for _ in range(6)] == expected
        with pytest.raises(FaultError, match="NaN or infinite") as caught:
            list(stream)
        assert caught.value.fault_code == "non_finite"


def random_rounds(rng: np.random.Generator, count: int) -> list[RoundToVerify]:
    rounds = []
    for _ in range(count):
        mode = (Mode.COUPLED, Mode.TOPK, Mode.FULL)[rng.integers(3)]
        sampling = list(SAMPLINGS.values())[rng.integers(3)]
        sent = draft(mode, sampling)
        by_rejection = mode is not Mode.COUPLED and not sampling.greedy
        distributions = sent.distributions if by_rejection else ()
        rounds.append(RoundToVerify(sampling, int(rng.integers(1, 99)), sent.token_ids, distributions, by_rejection))
    return rounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_bad_rows_change_no_other_rounds_result(kind: str, seed: int) -> None:
    """A bad row after the first rejected token changes nothing; any other makes the result not finite."""
    rng = np.random.default_rng(seed)
    rounds = random_rounds(rng, 24)
    logits = rng.normal(0, 1, (3 * len(rounds), VOCAB)).astype(np.float32)
    logits[:, 3] = -np.inf  # a token that the target excludes
    logits[np.arange(0, len(logits), 3), 6] += rng.integers(0, 9, len(rounds))  # sometimes the first is accepted
    healthy = verify_rounds(torch.tensor(logits), rounds)
    bad_rows = {index: int(rng.integers(3)) for index in range(0, len(rounds), 2)}
    for index, row in bad_rows.items():
        logits[3 * index + row] = bad_row(kind)
    results = verify_rounds(torch.tensor(logits), rounds)
    for index, (result, before) in enumerate(zip(results, healthy, strict=True)):
        if index not in bad_rows or bad_rows[index] > before.accepted:
            assert result == before
        else:
            assert not result.finite
        assert 0 <= result.token_id < VOCAB
        assert 0 <= result.accepted <= 2
    assert not all(bad_rows[index] <= healthy[index].accepted for index in bad_rows)


def test_single_tokens_may_have_a_logit_of_minus_infinity() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 4] = -1e30
    for sampling in SAMPLINGS.values():
        assert verify_rounds(logits, [RoundToVerify(sampling, 5)]) == [VerificationResult(0, 4)]


def test_verification_reaches_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the results; the numbers that the check of the logits needs stay where the model is."""
    rounds = random_rounds(np.random.default_rng(0), 12)
    rounds += [replace(one, block_verification=True) for one in rounds if one.rejection_sampling]
    logits = torch.zeros(3 * len(rounds), VOCAB)
    transfers: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, name)

        def recording(self: torch.Tensor, *args: Any, _name: str = name, _method: Any = method) -> Any:
            if self.device == logits.device:
                transfers.append(_name)
            with torch._C.DisableTorchFunction():  # with a default device each method would be called twice
                return _method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, recording)
    verify_rounds(logits, rounds)
    assert transfers == ["tolist"]
