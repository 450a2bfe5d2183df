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
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Self, TypeAlias

import numpy as np

from protocol.errors import SettingsError
from protocol.full_distribution import FullDistribution
from protocol.limits import Limits
from protocol.logprobs import MAX_TOP_LOGPROBS, TokenLogprobs
from protocol.sparse import SparseDistribution

PROTOCOL_VERSION = 6
VOCABULARY_VERSION = 3
"""The first version with the vocabulary size and the stop ids in Welcome, and sampling settings in Extend."""
PACE_VERSION = 4
"""The first version with the target's pace in Welcome."""
SAMPLING_VERSION = 5
"""The first version with sampling settings beyond temperature, top-k, top-p and seed."""
BLOCK_VERSION = 6
"""The first version with block verification."""
OLDEST_VERSION = 1
"""It has no Resume, window or encodings."""
DraftDistribution: TypeAlias = SparseDistribution | FullDistribution
"""What a drafted token was sampled from; those of a Draft are of one kind."""
HASH_BYTES = 8
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKEN_IDS = 64
_FIRST_SETTINGS = 4
"""Temperature, top-k, top-p and seed, which every version has."""


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

    They are applied in this order: logit bias, repetition penalty, presence and frequency
    penalties (``penalties.py``), grammar, minimum number of tokens, min-p, temperature, top-k, top-p.

    Attributes:
        temperature: 0 is argmax.
        top_k: the number of most likely tokens that are kept; 0 keeps all.
        top_p: keep the fewest most likely tokens with this probability; 1 keeps all.
        seed: of all random numbers.
        min_p: keep tokens at least this times as likely as the most likely one, before the temperature; 0 keeps all.
        repetition_penalty: divides the positive logits of tokens in the prompt and the answer, multiplies others.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted from the logit of a token in the answer, as often as it is there.
        logit_bias: pairs of a token id and what is added to its logit.
        min_tokens: tokens of the answer before the first that may end it.
        ignore_eos: whether the model's stop ids do not end the answer.
        stop_token_ids: further ids that end it.
        grammar: that the answer follows, in the format of ``common/grammar.py``; "" for none.
        logprobs: how many likeliest tokens a Verdict tells with the log-probability of each token; None for nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    grammar: str = ""
    logprobs: int | None = None

    def __post_init__(self) -> None:
        biases = [bias for _, bias in self.logit_bias]
        for name, is_allowed, allowed in (
            (
                "temperature",
                self.greedy or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
                f"0 (argmax), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            ),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (all tokens)"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100; 1 for none"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("logit_bias", all(-100 <= bias <= 100 for bias in biases), "-100 to 100 for each token"),
            ("min_tokens", 0 <= self.min_tokens < 2**31, "0 or a number of tokens"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
            ("min_tokens", not (self.grammar and self.min_tokens), "0 with a grammar, which ends the answer"),
            ("ignore_eos", not (self.grammar and self.ignore_eos), "false with a grammar, which ends the answer"),
        ):
            if not is_allowed:  # as NaN, which compares false
                raise SettingsError(name, getattr(self, name), allowed)
        self._check_counts()

    def _check_counts(self) -> None:
        for name, most in (("logit_bias", MAX_BIASED_TOKENS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
            if len(getattr(self, name)) > most:
                raise SettingsError(name, f"{len(getattr(self, name))} tokens", f"up to {most}")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise SettingsError("logit_bias", self.logit_bias, "each token once")

    @property
    def greedy(self) -> bool:
        """Whether the next token is the argmax."""
        return self.temperature == 0

    @property
    def later_settings(self) -> tuple[str, ...]:
        """The names of the settings in use that only base stations from ``SAMPLING_VERSION`` on know."""
        return tuple(
            entry.name for entry in fields(self)[_FIRST_SETTINGS:] if getattr(self, entry.name) != entry.default
        )

    @property
    def penalizes(self) -> bool:
        """Whether logit bias or penalties change the logits."""
        return bool(self.logit_bias) or self.counts_answer or self.repetition_penalty != 1

    @property
    def counts_answer(self) -> bool:
        """Whether the tokens of the answer so far are counted for presence and frequency penalties."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_answer_len(self) -> bool:
        """Whether the next token depends on where the answer began."""
        return self.counts_answer or self.min_tokens > 0 or bool(self.grammar)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature, top-k and top-p changes the target's logits."""
        return self.penalizes or self.min_tokens > 0 or self.min_p > 0 or bool(self.grammar)

    def stop_ids(self, model_stop_ids: frozenset[int]) -> frozenset[int]:
        """The ids that end an answer of a model with these stop ids."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else model_stop_ids)


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
    from a base station of version 3 or older. ``max_grammar_len`` is 0 where the base station has no grammars.
    ``block_verification`` is whether a session may ask for it.
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
    max_grammar_len: int = 0
    block_verification: bool = False


@dataclass(frozen=True, slots=True)
class Open:
    """Open a session with a prompt, a mode and sampling settings.

    The last ``answer_len`` tokens of the prompt belong to the answer: those committed before the session was
    opened again. It is 0 where the sampling settings do not depend on it. With ``block_verification`` Drafts that
    carry distributions are accepted by the joint probability of their tokens.
    """

    session_id: int
    round_id: int
    mode: Mode
    sampling: Sampling
    prompt_ids: tuple[int, ...]
    answer_len: int = 0
    block_verification: bool = False


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
    otherwise it is invalidated. All tokens of a ``given`` Draft are accepted: they are
    part of the prompt, and their log-probabilities are asked for.
    """

    session_id: int
    round_id: int
    token_ids: tuple[int, ...]
    distributions: tuple[DraftDistribution, ...] = ()
    assumed_bonus: int | None = None
    given: bool = False


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
    *bonus* token otherwise. ``logprobs`` are of these tokens, if the sampling settings ask for them.
    """

    session_id: int
    round_id: int
    accepted: int
    token_id: int
    logprobs: tuple[TokenLogprobs, ...] = ()


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
