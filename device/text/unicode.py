"""Texts that UTF-8 cannot write: JSON allows half of a surrogate pair, and so does a command line with wrong bytes."""

from protocol.errors import SettingsError


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_unicode(name: str, text: str) -> None:
    """Refuse a text that UTF-8 cannot write.

    Raises:
        SettingsError: the text called ``name`` is one.
    """
    if not is_unicode(text):
        raise SettingsError(name, text, "text in UTF-8")
