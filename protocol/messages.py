"""The messages between device and base station.

A device first sends Hello and receives Welcome. In a session every *request* of the
device carries the next ``round_id``, and every reply carries the round that it answers:

=========  ==========================================  =======================
request    content                                     reply
=========  ==========================================  =======================
Open       the prompt and the sampling settings        Opened
Draft      drafted tokens                              one Verdict
Decode     a number of tokens for the target alone     a Verdict for each token
Extend     the next turn of a conversation             Opened
=========  ==========================================  =======================

Close and Fault end a session and have no reply. Resume asks whether a session still
exists, does not change it, and is answered by Resumed.

Fields are only ever appended, with defaults: an older version ignores or omits the
fields that it does not know.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeAlias

import numpy as np

from protocol.errors import SettingsError
from protocol.full_distribution import FullDistribution
from protocol.limits import Limits
from protocol.sparse import SparseDistribution

PROTOCOL_VERSION = 4
VOCABULARY_VERSION = 3
"""The first version with the vocabulary size and the stop ids in Welcome, and sampling settings in Extend."""
PACE_VERSION = 4
"""The first version with the target's pace in Welcome."""
OLDEST_VERSION = 1
"""It has no Resume, window or encodings."""
DraftDistribution: TypeAlias = SparseDistribution | FullDistribution
"""What a drafted token was sampled from; those of a Draft are of one kind."""
HASH_BYTES = 8
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 100.0


class Encoding(StrEnum):
    """How the distributions of a Draft are encoded."""

    SPARSE = "sparse"
    """The supports and the weights of a round, each as one set of integers (``draft_codec.py``)."""
    FP16 = "fp16"
    """All V probabilities in FP16."""


class Mode(StrEnum):
    """What a Draft carries for each token."""

    IDS = "ids"
    """The id, at temperature 0: verification compares it with the target's argmax."""
    COUPLED = "coupled"
    """The id: both ends add the same noise to their scores, and the base station's choice is the output."""
    TOPK = "topk"
    """The id and the K most likely entries of its distribution."""
    TOPP = "topp"
    """The id and the fewest most likely entries whose mass reaches a threshold."""
    FULL = "full"
    """The id and all V probabilities: the baseline of the paper."""
    TARGET = "target"
    """Nothing: the target decodes alone, the baseline of every comparison."""

    @property
    def sends_ids_alone(self) -> bool:
        """Whether a Draft has no distributions."""
        return self in (Mode.IDS, Mode.COUPLED)

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the mode's distributions, if it sends any."""
        if self is Mode.FULL:
            return Encoding.FP16
        return Encoding.SPARSE if self in (Mode.TOPK, Mode.TOPP) else None


@dataclass(frozen=True, slots=True)
class Sampling:
    """The target's sampling settings; the output is distributed as the target's own with the same settings.

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
                f"0 (argmax), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            )
        if not 0 <= self.top_k < 2**31:
            raise SettingsError("top_k", self.top_k, "0 (all tokens) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise SettingsError("top_p", self.top_p, "above 0, up to 1 (all tokens)")
        if not 0 <= self.seed < 2**63:
            raise SettingsError("seed", self.seed, "0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the next token is the argmax."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a device: its protocol version and its draft model's vocabulary."""

    version: int
    vocab_size: int
    vocabulary_hash: bytes
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Welcome:
    """The base station accepts the vocabulary, and describes its target and its limits.

    ``version`` is the protocol version that both ends use from now on. The limits are
    those of ``limits.py``; an older base station sends only the draft length. Token ids
    are encoded for ``vocab_size`` tokens, and ``stop_ids`` end an answer on both ends;
    where ``vocab_size`` is 0 (version 2 and older) both are those of the Hello.

    ``pass_seconds`` is the time of a forward pass that runs one token of another session
    now, and ``row_seconds`` what each further token adds; 0 where it is not measured, and
    from a base station of version 3 or older.
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
    vocab_size: int = 0
    stop_ids: tuple[int, ...] = ()
    pass_seconds: float = 0.0
    row_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Open:
    """Open a session with a prompt, a mode and sampling settings."""

    session_id: int
    round_id: int
    mode: Mode
    sampling: Sampling
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """An Open or Extend was accepted."""

    session_id: int
    round_id: int


@dataclass(frozen=True, slots=True)
class Extend:
    """Keep the first ``start`` committed tokens and append ``token_ids``; ``sampling`` None keeps the settings."""

    session_id: int
    round_id: int
    start: int
    token_ids: tuple[int, ...]
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens and, in modes that send them, the distribution that each was drawn from.

    A Draft without tokens requests one token of the target. A Draft with an
    ``assumed_bonus`` is sent before the Verdict of the previous round. It is valid if
    all tokens of that round are accepted and the Verdict's token is ``assumed_bonus``;
    otherwise it is invalidated.
    """

    session_id: int
    round_id: int
    token_ids: tuple[int, ...]
    distributions: tuple[DraftDistribution, ...] = ()
    assumed_bonus: int | None = None


@dataclass(frozen=True, slots=True)
class Decode:
    """Request ``count`` tokens of the target alone, up to a stop id.

    Equivalent to ``count`` empty Drafts, the first of which has ``round_id``.
    """

    session_id: int
    round_id: int
    count: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first ``accepted`` drafted tokens are accepted, and ``token_id`` follows them.

    ``token_id`` is the *recovered* token if a drafted token was rejected, and the
    *bonus* token otherwise.
    """

    session_id: int
    round_id: int
    accepted: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Ask whether a session still exists with these committed tokens.

    ``round_id`` is the round whose reply the device awaits, or its next round; the hash
    covers the ``committed_len`` committed tokens.
    """

    session_id: int
    round_id: int
    committed_len: int
    committed_hash: bytes

    @classmethod
    def of(cls, session_id: int, round_id: int, tokens: Sequence[int]) -> Self:
        """The Resume of a session with the committed ``tokens``."""
        return cls(session_id, round_id, len(tokens), _hash(tokens))

    def agrees(self, tokens: Sequence[int]) -> bool:
        """Whether ``tokens`` start with the device's committed tokens."""
        known = tokens[: self.committed_len]
        return len(known) == self.committed_len and _hash(known) == self.committed_hash


@dataclass(frozen=True, slots=True)
class Resumed:
    """The session exists, at round ``round_id`` and with ``committed_len`` committed tokens."""

    session_id: int
    round_id: int
    committed_len: int


@dataclass(frozen=True, slots=True)
class Close:
    """The device ends the session."""

    session_id: int


@dataclass(frozen=True, slots=True)
class Fault:
    """An error: the ``code`` of an ``EdgedraftError`` and one line of text.

    ``session_id`` is None if the error belongs to no session. ``retry_seconds`` is the
    time to wait before a retry, 0 if unknown.
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
