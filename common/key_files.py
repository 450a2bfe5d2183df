"""Keys of the link as text and as files; either end makes, keeps and reads its own.

A key is 32 bytes, written as 40 characters of Z85 (ZeroMQ RFC 32). Knows no
cryptography: pairs come from whoever has a socket library.
"""

import stat
from pathlib import Path

from protocol.errors import KeyFileError, SettingsError

_LENGTH = 40
_GROUP = 5
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_PUBLIC = "edgedraft-public-key"
_SECRET = "edgedraft-secret-key"  # noqa: S105 - the label of a file, no secret
_FORBIDDEN = stat.S_IRWXG | stat.S_IRWXO


def write_pair(path: Path, public: str, secret: str) -> None:
    """Write the secret key to ``path``, for its owner alone, and the public one beside it as ``path``.pub.

    Raises:
        KeyFileError: one of the files exists already, or cannot be written.
    """
    beside = public_path(path)
    for taken in (path, beside):
        if taken.exists():
            raise KeyFileError(f"{str(taken)!r} exists already; name another file, or remove it if nothing needs it")
    try:
        path.touch(0o600, exist_ok=False)  # before the secret is in it
        path.write_text(f"{_SECRET} {secret}\n", encoding="ascii")
        beside.write_text(f"{_PUBLIC} {public}\n", encoding="ascii")
    except OSError as error:
        raise KeyFileError(f"{error.filename!r} cannot be written: {error.strerror}") from error


def public_path(path: Path) -> Path:
    """Where the public key lies that belongs to the secret one at ``path``."""
    return path.with_name(f"{path.name}.pub")


def read_secret(path: Path) -> str:
    """Read a secret key.

    Raises:
        KeyFileError: there is none, it is damaged, or others may read it.
    """
    secret = _read(path, _SECRET)
    if path.stat().st_mode & _FORBIDDEN:
        raise KeyFileError(f"{str(path)!r} holds a secret key and is open to others; run: chmod 600 {path}")
    return secret


def read_public(given: str) -> str:
    """A public key, given as such or as the file that holds it.

    Raises:
        SettingsError: it is neither a key nor a file.
        KeyFileError: the file holds no public key.
    """
    if _is_key(given):
        return given
    if not Path(given).exists():
        raise SettingsError("the public key", given, f"{_LENGTH} characters of Z85, or a file that holds them")
    return _read(Path(given), _PUBLIC)


def _read(path: Path, label: str) -> str:
    try:
        found, _, key = path.read_text(encoding="ascii").strip().partition(" ")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise KeyFileError(f"{str(path)!r} cannot be read as a key file: {reason}") from error
    if found != label or not _is_key(key):
        raise KeyFileError(f"{str(path)!r} is no file of the kind {label!r}; make a pair with: keys new")
    return key


def _is_key(text: str) -> bool:
    """Whether ``text`` is 32 bytes in Z85: each group of five characters below 2**32."""
    if len(text) != _LENGTH or not set(text) <= set(_DIGITS):
        return False
    groups = (text[start : start + _GROUP] for start in range(0, _LENGTH, _GROUP))
    return all(_number(group) < 2**32 for group in groups)


def _number(group: str) -> int:
    number = 0
    for digit in group:
        number = len(_DIGITS) * number + _DIGITS.index(digit)
    return number
