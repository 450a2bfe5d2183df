"""The committed tokens of a session, in 4 bytes each, and keys by which equal prefixes are found.

The key of a page is a hash of all tokens up to its end, so that two sequences share
exactly the pages whose keys are equal: no comparison of tokens is needed.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence


class CommittedTokens:
    """A growing sequence of token ids.

    Args:
        page_size: of the KV pool.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._ids = array("I")
        self._keys: list[bytes] = []

    def append(self, token_ids: Iterable[int]) -> None:
        """Append tokens."""
        self._ids.extend(token_ids)

    def replace_from(self, start: int, token_ids: Iterable[int]) -> None:
        """Keep the first ``start`` tokens and append ``token_ids``."""
        del self._ids[start:]
        del self._keys[start // self._page_size :]
        self._ids.extend(token_ids)

    @property
    def shareable_keys(self) -> Sequence[bytes]:
        """The keys of the whole pages before the last token, which runs with a round and is never shared."""
        count = max(0, len(self._ids) - 1) // self._page_size
        while len(self._keys) < count:
            start = len(self._keys) * self._page_size
            before = self._keys[-1] if self._keys else b""
            self._keys.append(hashlib.sha256(before + self._ids[start : start + self._page_size].tobytes()).digest())
        return self._keys[:count]

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens take."""
        return len(self._ids) * self._ids.itemsize

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, part: slice) -> "array[int]":
        return self._ids[part]
