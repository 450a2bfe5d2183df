"""A prompt in the session's tokens, and in those of a draft model with a vocabulary of its own."""

from collections.abc import Iterable


class Prompt(list[int]):
    """The token ids of a prompt.

    Args:
        token_ids: as the target takes them.
        draft_ids: the same prompt in the draft model's own tokens; empty where these are the target's, or where
            the draft model has no form of its own for the prompt.
    """

    def __init__(self, token_ids: Iterable[int], draft_ids: Iterable[int] = ()) -> None:
        super().__init__(token_ids)
        self.draft_ids = list(draft_ids)
