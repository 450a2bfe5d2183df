"""The tokens that two vocabularies share, by their bytes; ``export`` writes the map and ``device`` reads it.

Special tokens are mapped by their role (the end of a turn, the start of a text), or
else by their text. A target token that the draft model does not have is spelled with
several of the draft model's, so that any sequence of target tokens has a translation.
"""

from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from common.token_bytes import TokenBytes
from protocol.bundle import DRAFT_TOKENIZER_NAME, TOKENIZER_NAME, VOCABULARY_MAP_NAME, DraftVocabulary, Manifest
from protocol.errors import BundleError, MismatchError

Ids: TypeAlias = npt.NDArray[np.int32]
Logits: TypeAlias = npt.NDArray[np.float32]
ABSENT = -1
SHARPENING = 1.25
"""Factor of the draft model's logits: a small model of another family is less certain than the target.

Any factor is exact, since drafts are guesses; this one raises the acceptance in mode ``coupled``.
"""
_TEXT_BYTES = frozenset({*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)})
"""Bytes that text has; vocabularies lack some control characters and bytes that UTF-8 never or hardly uses."""


class VocabularyMap:
    """A map of target ids to the draft model's ids.

    Args:
        draft_ids: int32 [target's vocab_size]: the draft model's id of each target token, or ``ABSENT``.
        target: the target's tokens.
        draft: the draft model's tokens.

    Attributes:
        draft_ids: as given.

    Raises:
        BundleError: it maps a token to one of other bytes.
        MismatchError: a target token cannot be spelled with the draft model's tokens.
    """

    def __init__(self, draft_ids: Ids, target: TokenBytes, draft: TokenBytes) -> None:
        self.draft_ids = draft_ids
        self._target = target
        self._by_bytes = _by_bytes(draft)
        self._longest = max(map(len, self._by_bytes), default=0)
        self._texts = dict(target.ordinary) | {token_id: text.encode() for text, token_id in target.special.items()}
        self._spellings: dict[int, tuple[int, ...]] = {}
        self._common = np.flatnonzero(draft_ids != ABSENT)
        self._their_draft_ids = draft_ids[self._common]
        self._check(draft)

    @classmethod
    def build(cls, target: TokenBytes, draft: TokenBytes, vocab_size: int) -> "VocabularyMap":
        """Map the tokens of equal bytes, and special tokens by role or text."""
        draft_ids = np.full(vocab_size, ABSENT, np.int32)
        by_bytes, taken = _by_bytes(draft), set[int]()
        for token_id, content in target.ordinary.items():
            draft_id = by_bytes.get(content, ABSENT)
            if draft_id != ABSENT and draft_id not in taken:
                draft_ids[token_id] = draft_id
                taken.add(draft_id)
        for token_id, draft_id in _special_pairs(target, draft).items():
            draft_ids[token_id] = draft_id
        return cls(draft_ids, target, draft)

    @classmethod
    def read(cls, bundle: Path, manifest: Manifest, own: DraftVocabulary) -> "VocabularyMap":
        """Read the map of a bundle, and check it against the two tokenizers.

        Raises:
            BundleError: the file is damaged, or maps a token to one of other bytes.
            ModelError: a tokenizer cannot be used.
        """
        path = bundle / VOCABULARY_MAP_NAME
        try:
            draft_ids = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{str(path)!r} cannot be read: {error}; export the bundle again") from error
        if draft_ids.dtype != np.int32 or draft_ids.shape != (manifest.vocab_size,):
            raise BundleError(
                f"{str(path)!r} holds {draft_ids.dtype} of shape {draft_ids.shape}; allowed: int32 of shape "
                f"({manifest.vocab_size},); export the bundle again"
            )
        target, draft = (
            TokenBytes.read(bundle / name, one.vocab_size, one.bos_token, one.eos_token)
            for name, one in ((TOKENIZER_NAME, manifest), (DRAFT_TOKENIZER_NAME, own))
        )
        return cls(draft_ids, target, draft)

    def write(self, path: Path) -> None:
        """Write the map as a NumPy array."""
        np.save(path, self.draft_ids, allow_pickle=False)

    @property
    def common_tokens(self) -> int:
        """Tokens that both vocabularies have."""
        return len(self._common)

    def spelling(self, token_id: int) -> tuple[int, ...]:
        """The draft model's tokens for a target token: the one of equal bytes, or else the longest ones in turn.

        Empty for an id without a token, as vocabularies have for padding, and for bytes that no draft token has.
        """
        if token_id not in self._spellings:
            is_common = token_id < len(self.draft_ids) and self.draft_ids[token_id] != ABSENT
            self._spellings[token_id] = (
                (int(self.draft_ids[token_id]),) if is_common else self._spelled(self._texts.get(token_id, b""))
            )
        return self._spellings[token_id]

    def target_logits(self, draft_logits: Logits) -> Logits:
        """The draft model's logits times ``SHARPENING`` by target id, -inf for tokens that it does not have.

        Args:
            draft_logits: float32 [draft model's V].

        Returns:
            float32 [target's V].
        """
        logits = np.full(len(self.draft_ids), -np.inf, np.float32)
        logits[self._common] = draft_logits[self._their_draft_ids] * np.float32(SHARPENING)
        return logits

    def _spelled(self, content: bytes) -> tuple[int, ...]:
        ids, start = [], 0
        while start < len(content):
            ends = range(min(start + self._longest, len(content)), start, -1)
            end = next((end for end in ends if content[start:end] in self._by_bytes), None)
            if end is not None:
                ids.append(self._by_bytes[content[start:end]])
            start = end or start + 1
        return tuple(ids)

    def _check(self, draft: TokenBytes) -> None:
        special = _special_pairs(self._target, draft)
        for token_id, draft_id in zip(self._common.tolist(), self._their_draft_ids.tolist(), strict=True):
            own, other = self._target.ordinary.get(token_id), draft.ordinary.get(draft_id)
            if (own != other or own is None) and special.get(token_id) != draft_id:
                raise BundleError(
                    f"the vocabulary map gives the target's token {token_id} ({own!r}) the draft model's {draft_id} "
                    f"({other!r}); allowed: one of the same bytes or the same role; export the bundle again"
                )
        needed = {byte for content in self._texts.values() for byte in content} & _TEXT_BYTES
        missing = sorted(byte for byte in needed if bytes([byte]) not in self._by_bytes)
        if missing:
            raise MismatchError(
                f"the draft model has no token for the byte 0x{missing[0]:02X}, which the target's tokens contain; "
                "use a draft model with byte-level BPE, or SentencePiece with byte fallback"
            )


def _by_bytes(tokens: TokenBytes) -> dict[bytes, int]:
    """The first token of each bytes."""
    found: dict[bytes, int] = {}
    for token_id, content in tokens.ordinary.items():
        if content:
            found.setdefault(content, token_id)
    return found


def _special_pairs(target: TokenBytes, draft: TokenBytes) -> dict[int, int]:
    """The draft model's ids of special tokens by the target's, each at most once: by role first, then by text."""
    roles = ((target.eos_token, draft.eos_token), (target.bos_token, draft.bos_token))
    pairs: dict[int, int] = {}
    for own, other in (*roles, *((text, text) for text in target.special)):
        token_id, draft_id = target.special.get(own), draft.special.get(other)
        if token_id is not None and draft_id is not None and token_id not in pairs and draft_id not in pairs.values():
            pairs[token_id] = draft_id
    return pairs
