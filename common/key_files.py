"""The file format of CURVE keys: one public or one secret key per file, as text, for both ends.

A key is 32 bytes, written as 40 characters of Z85 (ZeroMQ RFC 32). Knows no cryptography:
``device/link/curve_keys.py`` and ``basestation/devices/key_folder.py`` generate the pairs.
"""

import os
import stat
from pathlib import Path

from protocol.errors import KeyFileError, SettingsError

_LENGTH = 40
_GROUP = 5
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_PUBLIC = "edgedraft-public-key"
_SECRET = "edgedraft-secret-key"  # noqa: S105 - the label in a file, not a secret
_FORBIDDEN = stat.S_IRWXG | stat.S_IRWXO


def write_pair(path: Path, public: str, secret: str) -> None:
    """Write the secret key to ``path``, readable by its owner only, and the public key to ``path``.pub.

    Raises:
        KeyFileError: a file exists already or cannot be written; then there is neither.
    """
    public_file = public_path(path)
    for file in (path, public_file):
        if file.exists():
            raise KeyFileError(f"{str(file)!r} exists already; choose another file, or remove it if it is unused")
    try:
        path.touch(0o600, exist_ok=False)  # restrict the mode before the secret is written
    except OSError as error:
        raise KeyFileError(f"{str(path)!r} cannot be written: {error.strerror}") from error
    try:
        path.write_text(f"{_SECRET} {secret}\n", encoding="ascii")
        public_file.write_text(f"{_PUBLIC} {public}\n", encoding="ascii")
    except OSError as error:
        for file in (path, public_file):
            file.unlink(missing_ok=True)
        raise KeyFileError(f"{str(path)!r} and its .pub cannot be written: {error.strerror}") from error


def public_path(path: Path) -> Path:
    """The file of the public key that belongs to the secret key at ``path``.

    Raises:
        KeyFileError: ``path`` names a folder.
    """
    if not path.name:
        raise KeyFileError(f"{str(path)!r} is a folder; name a file for the secret key")
    return path.with_name(f"{path.name}.pub")


def read_secret(path: Path) -> str:
    """Read a secret key.

    Raises:
        KeyFileError: the file is missing or damaged, or others can read it.
    """
    secret = _read(path, _SECRET)
    if path.stat().st_mode & _FORBIDDEN:
        raise KeyFileError(f"{str(path)!r} holds a secret key and is readable by others; run: chmod 600 {path}")
    return secret


def read_public(given: str) -> str:
    """Read a public key, given as text, as the line in a file, or as a file.

    Raises:
        SettingsError: ``given`` is neither a key nor a file.
        KeyFileError: the file does not hold a public key.
    """
    key = given.strip().removeprefix(f"{_PUBLIC} ")
    if _is_key(key):
        return key
    if not os.path.exists(given):  # noqa: PTH110 - False for any text that is no path, as for one of 5,000 characters
        raise SettingsError("the public key", given, f"{_LENGTH} characters of Z85, or a file that holds them")
    return _read(Path(given), _PUBLIC)


def _read(path: Path, label: str) -> str:
    try:
        found, _, key = path.read_text(encoding="ascii").strip().partition(" ")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise KeyFileError(f"{str(path)!r} cannot be read as a key file: {reason}") from error
    if found != label or not _is_key(key):
        raise KeyFileError(f"{str(path)!r} is not a file of type {label!r}; create a pair with: keys new")
    return key


def _is_key(text: str) -> bool:
    """Whether ``text`` is 32 bytes in Z85: each group of five characters is below 2**32."""
    if len(text) != _LENGTH or not set(text) <= set(_DIGITS):
        return False
    groups = (text[start : start + _GROUP] for start in range(0, _LENGTH, _GROUP))
    return all(_number(group) < 2**32 for group in groups)


def _number(group: str) -> int:
    number = 0
    for digit in group:
        number = len(_DIGITS) * number + _DIGITS.index(digit)
    return number
