"""Sessions that draft by prompt lookup, over models that are tables."""

from collections.abc import Iterable, Sequence

import numpy as np

from device.drafting.draft_model import SequenceModel
from device.session.session import AnswerToken, DeviceSession
from device.settings import DraftSettings
from tests.fakes import Table
from tests.timed_pair import TimedPair

CYCLE = [3, 1, 4, 15, 9, 2, 6, 5, 8, 7, 0, 10, 12, 11, 13, 14]


def follower(order: Iterable[int]) -> Table:
    """A table whose token is always the next one of ``order``, and at its end the first."""
    ids = [*order]
    rows = np.zeros((len(ids), len(ids)), np.float32)
    rows[ids, [*ids[1:], ids[0]]] = 9
    return np.broadcast_to(rows, (len(ids), *rows.shape))


def timed_answer(
    pair: TimedPair,
    settings: DraftSettings,
    count: int,
    prompt: Sequence[int] = (3, 1, 4),
    model: SequenceModel | None = None,
    prediction: Sequence[int] = (),
) -> tuple[list[AnswerToken], float, DeviceSession]:
    """The tokens of an answer, the seconds from the first to the last, and the session."""
    session = pair.session(settings, prompt, model, prediction)
    tokens: list[AnswerToken] = []
    first = 0.0
    for token in session.answer(count):
        first = first if tokens else pair.now
        tokens.append(token)
    return tokens, pair.now - first, session
