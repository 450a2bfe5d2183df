"""Hello and Welcome: which draft models fit the target, and which protocol version each owner speaks."""

from dataclasses import replace

from basestation.engine.pace import Pace
from basestation.target.served_target import ServedTarget
from protocol.errors import MismatchError
from protocol.limits import Limits
from protocol.messages import (
    BLOCK_VERSION,
    OLDEST_VERSION,
    PACE_VERSION,
    PROTOCOL_VERSION,
    SAMPLING_VERSION,
    VOCABULARY_VERSION,
    Hello,
    Mode,
    Welcome,
)

_REMEDY = "export the draft model again with --target"
_MAX_GREETED = 10_000  # an owner that was dropped gets the Fault "unknown_session" and sends Hello again


class Handshake:
    """Answers Hello, and keeps the version of every owner that sent one.

    Args:
        target: what draft models must match.
        limits: announced in the Welcome.
    """

    def __init__(self, target: ServedTarget, limits: Limits) -> None:
        self._target = target
        self._limits = limits
        self._versions: dict[str, int] = {}

    def greet(self, owner: str, hello: Hello, pace: Pace) -> Welcome:
        """Accept a draft model, and tell it the target's ``pace``.

        Raises:
            MismatchError: its vocabulary or its protocol version does not match, before version 3 its stop ids.
        """
        self._check(hello)
        version = min(hello.version, PROTOCOL_VERSION)
        self.note(owner, version)
        return self._welcome(version, pace)

    def note(self, owner: str, version: int) -> None:
        """Keep the version of an owner that was greeted here or elsewhere."""
        self._versions.pop(owner, None)
        self._versions[owner] = version
        if len(self._versions) > _MAX_GREETED:
            del self._versions[next(iter(self._versions))]

    def greeted(self, owner: str) -> bool:
        """Whether an owner sent Hello."""
        return owner in self._versions

    def version_of(self, owner: str) -> int:
        """The version of an owner that sent Hello, 0 for others."""
        return self._versions.get(owner, 0)

    def speaks_oldest(self, owner: str) -> bool:
        """Whether messages to an owner may have only the fields of the oldest version."""
        return self._versions.get(owner, OLDEST_VERSION) == OLDEST_VERSION

    def drop(self, owner: str) -> None:
        """Require another Hello of an owner."""
        self._versions.pop(owner, None)

    def _welcome(self, version: int, pace: Pace) -> Welcome:
        target, limits = self._target, self._limits
        welcome = Welcome(version, target.name, target.context_length, limits.max_draft_len, tuple(Mode))
        if version == OLDEST_VERSION:
            return welcome
        welcome = replace(
            welcome,
            max_prompt_len=limits.max_prompt_len,
            max_uplink_k=limits.max_uplink_k,
            max_sessions=limits.max_sessions,
            max_requests_per_second=limits.max_requests_per_second,
            window=limits.window,
        )
        if version < VOCABULARY_VERSION:
            return welcome
        vocabulary = target.vocabulary
        welcome = replace(welcome, vocab_size=vocabulary.size, stop_ids=tuple(sorted(vocabulary.stop_ids)))
        if version < PACE_VERSION:
            return welcome
        welcome = replace(welcome, pass_seconds=pace.pass_seconds, row_seconds=pace.row_seconds)
        if version >= SAMPLING_VERSION and target.has_grammars:
            welcome = replace(welcome, max_grammar_len=limits.max_grammar_len)
        return replace(welcome, block_verification=version >= BLOCK_VERSION)

    def _check(self, hello: Hello) -> None:
        vocabulary = self._target.vocabulary
        if hello.version < OLDEST_VERSION:
            raise MismatchError(
                f"protocol version {hello.version}; this base station speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}"
            )
        if hello.version < VOCABULARY_VERSION:
            self._check_with_padding(hello)
        elif hello.vocab_size > vocabulary.used_size:
            raise MismatchError(self._other_size(hello))
        else:
            self._check_hash(hello, vocabulary.hash_of_first(hello.vocab_size))

    def _check_with_padding(self, hello: Hello) -> None:
        """Check as protocol versions 1 and 2 do: all tokens, padding included, and the stop ids are the same."""
        vocabulary = self._target.vocabulary
        if hello.vocab_size != vocabulary.size:
            raise MismatchError(self._other_size(hello))
        self._check_hash(hello, vocabulary.hash_with_padding)
        if frozenset(hello.stop_ids) != vocabulary.stop_ids:
            raise MismatchError(
                f"a draft model that stops at the tokens {sorted(hello.stop_ids)}; the target stops at "
                f"{sorted(vocabulary.stop_ids)}; {_REMEDY}, or use protocol version {VOCABULARY_VERSION}"
            )

    def _other_size(self, hello: Hello) -> str:
        vocabulary = self._target.vocabulary
        padded = f" ({vocabulary.size} with padding)" if vocabulary.size != vocabulary.used_size else ""
        return f"a draft model of {hello.vocab_size} tokens; the target has {vocabulary.used_size}{padded}; {_REMEDY}"

    def _check_hash(self, hello: Hello, expected: bytes) -> None:
        if hello.vocabulary_hash != expected:
            own, target = hello.vocabulary_hash.hex()[:12], expected.hex()[:12]
            raise MismatchError(
                f"the draft model's {hello.vocab_size} tokens (SHA-256 {own}…) are not the first of the target's "
                f"{self._target.vocabulary.used_size} ({target}…); {_REMEDY}"
            )
