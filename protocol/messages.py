"""What the two ends say to each other.

A device greets once (Hello, Welcome). In a session every *request* of the
device carries the next ``round_id``, and every reply names the round it answers:

=========  ==========================================  =======================
request    says                                        answered by
=========  ==========================================  =======================
Open       the prompt and how to sample                Opened
Draft      assumed bonus tokens of the next tokens                  one Verdict
Decode     "target, decode alone for a while"          a Verdict for each token
Extend     the next turn of a conversation             Opened
=========  ==========================================  =======================

Close and Fault end a session and are not answered. Resume asks whether a session
is still there, changes nothing in it, and is answered by Resumed.

Fields are only ever appended, with defaults: who speaks an older version ignores
or leaves out what it does not know.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeAlias

import numpy as np

from protocol.errors import SettingsError
from protocol.limits import Limits
from protocol.sparse import SparseDistribution

PROTOCOL_VERSION = 2
OLDEST_VERSION = 1
"""Without Resume, windows and encodings."""
HASH_BYTES = 8
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 100.0


class Encoding(StrEnum):
    """How the distributions of a Draft are packed."""

    SPARSE = "sparse"
    """Supports and weights of the whole round, each as one set of integers (``drafted.py``)."""
    FP16 = "fp16"
    """All V probabilities in FP16."""


class Mode(StrEnum):
    """What is sent for each drafted token."""

    IDS = "ids"
    """The id: temperature 0, where verification is a match of argmaxes."""
    COUPLED = "coupled"
    """The id: both ends add the same noise to their scores, and the base station's choice is the answer."""
    TOPK = "topk"
    """The id and the K likeliest entries of the distribution it was drawn from."""
    TOPP = "topp"
    """The id and the likeliest entries that together reach a probability, as many as that takes."""
    FULL = "full"
    """The id and all V probabilities: the baseline the paper compares with."""
    TARGET = "target"
    """Nothing: the target decodes alone; the baseline of every comparison."""

    @property
    def sends_ids_alone(self) -> bool:
        """Whether a Draft has no distributions."""
        return self in (Mode.IDS, Mode.COUPLED)

    @property
    def encoding(self) -> Encoding | None:
        """Of its distributions, where it sends any."""
        if self is Mode.FULL:
            return Encoding.FP16
        return Encoding.SPARSE if self in (Mode.TOPK, Mode.TOPP) else None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target is sampled; the answer is distributed as if it had been so, alone.

    ``temperature`` 0 is argmax. ``top_k`` 0 and ``top_p`` 1 keep every token.
    They are applied in this order: temperature, top-k, top-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise SettingsError(
                "temperature",
                self.temperature,
                f"0 (always the likeliest token), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            )
        if not 0 <= self.top_k < 2**31:
            raise SettingsError("top_k", self.top_k, "0 (all tokens) or a count of tokens")
        if not 0 < self.top_p <= 1:
            raise SettingsError("top_p", self.top_p, "above 0, up to 1 (all tokens)")
        if not 0 <= self.seed < 2**63:
            raise SettingsError("seed", self.seed, "0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether only the likeliest token can follow."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Hello:
    """First word of a device: which vocabulary its draft model speaks."""

    version: int
    vocab_size: int
    vocabulary_hash: bytes
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Welcome:
    """The base station knows that vocabulary, and says what it serves.

    ``version`` is what both ends speak from now on. The limits are those of
    ``limits.py``; an older base station tells none but the draft length.
    """

    version: int
    model: str
    context_length: int
    max_draft_len: int
    modes: tuple[Mode, ...]
    encodings: tuple[Encoding, ...] = tuple(Encoding)
    max_prompt_len: int = Limits.max_prompt_len
    max_uplink_k: int = Limits.max_uplink_k
    max_sessions: int = Limits.max_sessions
    max_requests_per_second: int = Limits.max_requests_per_second
    window: int = 1


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a session: the prompt, once, and how the answer is sampled."""

    session_id: int
    round_id: int
    mode: Mode
    sampling: Sampling
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """An Open or Extend was taken."""

    session_id: int
    round_id: int


@dataclass(frozen=True, slots=True)
class Extend:
    """Keep the first ``start`` committed tokens and go on with ``token_ids``."""

    session_id: int
    round_id: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """``draft_len`` pipelined tokens and, in sampled modes, the distribution each was drawn from.

    No tokens at all ask for one token of the target. A Draft with a ``assumed_bonus`` is
    sent before the Verdict of the round before it: it is right where all tokens
    of that round stand and ``assumed_bonus`` follows them, and otherwise void.
    """

    session_id: int
    round_id: int
    token_ids: tuple[int, ...]
    distributions: tuple[SparseDistribution, ...] = ()
    assumed_bonus: int | None = None


@dataclass(frozen=True, slots=True)
class Decode:
    """Ask the target for ``count`` tokens of its own, until a stop id.

    It stands for as many empty Drafts, ``round_id`` being the first one's.
    """

    session_id: int
    round_id: int
    count: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first ``accepted`` drafted tokens stand, and ``token_id`` follows them.

    It is *recovered* where a drafted token was rejected and a *bonus* where all stand.
    """

    session_id: int
    round_id: int
    accepted: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Is the session still there, with these tokens?

    ``round_id`` is the round that the device awaits or begins next; the hash is of
    the first ``committed_len`` tokens.
    """

    session_id: int
    round_id: int
    committed_len: int
    committed_hash: bytes

    @classmethod
    def of(cls, session_id: int, round_id: int, tokens: Sequence[int]) -> Self:
        """For a session in which ``tokens`` are committed."""
        return cls(session_id, round_id, len(tokens), _hash(tokens))

    def agrees(self, tokens: Sequence[int]) -> bool:
        """Whether ``tokens`` begin as the device's do."""
        known = tokens[: self.committed_len]
        return len(known) == self.committed_len and _hash(known) == self.committed_hash


@dataclass(frozen=True, slots=True)
class Resumed:
    """The session is there; the base station stands at ``round_id`` and has committed so many tokens."""

    session_id: int
    round_id: int
    committed_len: int


@dataclass(frozen=True, slots=True)
class Close:
    """The device has no more use for the session."""

    session_id: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Something went wrong: ``code`` of an ``EdgedraftError`` and one line about it.

    ``session_id`` is None where no session can be blamed. ``retry_seconds`` is after
    how long it is worth trying again, 0 where that is not told.
    """

    session_id: int | None
    code: str
    text: str
    retry_seconds: int = 0


Request: TypeAlias = Open | Draft | Decode | Extend
Reply: TypeAlias = Opened | Verdict
Message: TypeAlias = Hello | Welcome | Request | Reply | Resume | Resumed | Close | Fault


def _hash(tokens: Sequence[int]) -> bytes:
    """The first ``HASH_BYTES`` bytes of SHA-256 of the ids as little-endian 32-bit numbers."""
    return hashlib.sha256(np.asarray(tokens, "<u4").tobytes()).digest()[:HASH_BYTES]
