"""Text of which the end may be replaced: verified text, and unverified text behind it."""

from dataclasses import dataclass

from common.common_prefix import common_prefix


@dataclass(frozen=True)
class Revision:
    """A change of shown text.

    Attributes:
        replaced: the end of the text so far, which is no longer part of it.
        text: what takes its place.
        verified: how many characters of ``text`` are verified.
        unverified: how many characters at the end of the whole text are not.
    """

    replaced: str
    text: str
    verified: int
    unverified: int


class TentativeText:
    """The text of an answer as it is shown.

    Attributes:
        unverified: shown behind the verified text.
    """

    def __init__(self) -> None:
        self.unverified = ""

    def revise(self, verified: str, unverified: str) -> Revision:
        """Add ``verified`` to the verified text and have ``unverified`` follow it; what that changes."""
        text = verified + unverified
        kept = common_prefix(self.unverified, text)
        revision = Revision(self.unverified[kept:], text[kept:], max(0, len(verified) - kept), len(unverified))
        self.unverified = unverified
        return revision
