"""A device without a draft model: it drafts by prompt lookup alone."""

from collections.abc import Sequence
from typing import Self

from device.drafting.draft_model import Logits
from protocol.bundle import Manifest


class NoDraftModel:
    """Takes the place of a draft model that is not loaded: no token fits its context, so that none is drafted with it.

    Args:
        manifest: of the bundle, whose tokenizer is used.

    Attributes:
        token_ids: none.
        forked_length: 0.
        length: 0.
    """

    forked_length = length = 0

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.token_ids: list[int] = []

    def fork(self, _: int) -> Self:
        """The same; there is no cache to copy."""
        return self

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Nothing is to be prepared for a prompt."""

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Never called: no token fits."""
        raise AssertionError(f"{len(token_ids)} tokens for a draft model that is not loaded")

    def rollback(self, length: int) -> None:
        """Nothing is cached."""

    def room(self, _: Sequence[int]) -> int:
        """No token fits."""
        return 0
