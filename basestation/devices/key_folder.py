"""The keys of a base station: its own key pair, and the enrolled devices.

::

    DIR/station          the secret key, readable by its owner only
    DIR/station.pub      the public key, for the devices
    DIR/devices/HEX      one enrolled device: the file's name is its key, the content its name
    DIR/revoked/HEX      one revoked device, likewise, so that it can be told why it is refused

Looking up a key looks at one file, so a running base station sees the effect of
``enroll`` and ``revoke`` at once.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from common.key_files import public_path, read_secret, write_pair
from protocol.errors import KeyFileError, SettingsError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_NAME = 64
_FILE_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class EnrolledDevice:
    """An enrolled device; ``keys list --json`` has the same field names."""

    name: str
    public_key: str


class KeyFolder:
    """A key folder.

    Args:
        path: of a folder created by ``create``.

    Raises:
        KeyFileError: the secret key is missing, or readable by others.
    """

    def __init__(self, path: Path) -> None:
        self.secret_key = read_secret(path / "station")
        self.public_path = public_path(path / "station")
        self.public_key = zmq.curve_public(self.secret_key.encode()).decode()
        self._devices = path / "devices"
        self._revoked = path / "revoked"

    @property
    def public_line(self) -> str:
        """The text of the public key's file.

        Raises:
            KeyFileError: it cannot be read.
        """
        try:
            return self.public_path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise KeyFileError(f"{str(self.public_path)!r} cannot be read: {reason}") from error

    @classmethod
    def create(cls, path: Path) -> "KeyFolder":
        """Create a key pair for a base station. Devices that are already enrolled in the folder stay enrolled.

        Raises:
            KeyFileError: the folder already has a key pair, or cannot be written.
        """
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
            (path / "devices").mkdir(exist_ok=True)
        except OSError as error:
            raise KeyFileError(f"{error.filename!r} cannot be created: {error.strerror}") from error
        public, secret = zmq.curve_keypair()
        write_pair(path / "station", public.decode(), secret.decode())
        return cls(path)

    def enroll(self, name: str, key: str) -> None:
        """Enroll a device; a running base station admits it at once.

        Raises:
            SettingsError: the name is invalid or taken, or the key is already enrolled, or was revoked.
        """
        if not _NAME.fullmatch(name):
            raise SettingsError(
                "the device's name", name, "1 to 64 letters, digits, '.', '_', '-', the first a letter or digit"
            )
        if name in self._names():
            raise SettingsError("the device's name", name, "a name that is not enrolled; revoke this one first")
        if (known := self.name_of(key)) is not None:
            raise SettingsError("the device's key", key, f"a key that is not enrolled; this one is {known!r}")
        if self.is_revoked(key):
            file = self._revoked_file(key)
            raise SettingsError(
                "the device's key",
                key,
                f"a key that was not revoked; create another on the device, or to admit this one again, remove {file}",
            )
        self._file(key).write_text(f"{name}\n", encoding="ascii")

    def revoke(self, name: str) -> None:
        """Revoke a device's key; a running base station ends its sessions.

        Raises:
            SettingsError: no device with that name is enrolled.
        """
        if name not in self._names():
            raise SettingsError("the device's name", name, ", ".join(self._names()) or "none: no device is enrolled")
        self._revoked.mkdir(exist_ok=True)
        for device in self.devices():
            if device.name == name:
                self._file(device.public_key).replace(self._revoked_file(device.public_key))

    def devices(self) -> list[EnrolledDevice]:
        """All enrolled devices, sorted by name.

        Raises:
            KeyFileError: the folder cannot be read.
        """
        return _devices_in(self._devices)

    def revoked_devices(self) -> list[EnrolledDevice]:
        """All revoked devices, sorted by name; several may have had the same one.

        Raises:
            KeyFileError: the folder cannot be read.
        """
        return _devices_in(self._revoked) if _exists(self._revoked) else []

    def is_enrolled(self, key: str) -> bool:
        """Whether a key is enrolled now; opens no file, so it needs no descriptor.

        Raises:
            KeyFileError: the folder does not tell.
        """
        if _exists(self._file(key)):
            return True
        if not _exists(self._devices):
            raise KeyFileError(f"{str(self._devices)!r} is missing; check the key folder")
        return False

    def is_revoked(self, key: str) -> bool:
        """Whether a key was enrolled once and is revoked now.

        Raises:
            KeyFileError: the folder does not tell.
        """
        return _exists(self._revoked_file(key))

    def name_of(self, key: str) -> str | None:
        """The name under which a key is enrolled now; None if it is not.

        Raises:
            KeyFileError: its file cannot be read.
        """
        return _name_in(self._file(key))

    def revoked_name_of(self, key: str) -> str | None:
        """The name under which a revoked key was enrolled; None if it is not known.

        Raises:
            KeyFileError: its file cannot be read.
        """
        return _name_in(self._revoked_file(key))

    def _names(self) -> list[str]:
        return [device.name for device in self.devices()]

    def _file(self, key: str) -> Path:
        return self._devices / z85.decode(key).hex()

    def _revoked_file(self, key: str) -> Path:
        return self._revoked / z85.decode(key).hex()


def _devices_in(folder: Path) -> list[EnrolledDevice]:
    """The devices of ``devices`` or ``revoked``, sorted by name."""
    try:
        files = [path for path in folder.iterdir() if _FILE_NAME.fullmatch(path.name)]
    except OSError as error:
        raise _unreadable(error) from error
    named = ((_name_in(file), z85.encode(bytes.fromhex(file.name)).decode()) for file in files)
    found = [EnrolledDevice(name, key) for name, key in named if name is not None]
    return sorted(found, key=lambda device: device.name)


def _name_in(file: Path) -> str | None:
    """The name in a device's file; None where there is no such file."""
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()[:_MAX_NAME]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(error) from error


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(error) from error
    return True


def _unreadable(error: OSError) -> KeyFileError:
    return KeyFileError(f"{str(error.filename)!r} cannot be read: {error.strerror}; check the key folder")
