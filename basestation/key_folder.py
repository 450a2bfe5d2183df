"""The keys of a base station: its own pair, and the devices that it lets in.

::

    DIR/station          the secret key, for its owner alone
    DIR/station.pub      the public key; devices need it
    DIR/devices/HEX      one enrolled device: the file is called after its key and holds its name

So asking whether a key is enrolled is one look at one file, and a running base
station sees at once what ``enroll`` and ``revoke`` did.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from common.key_files import public_path, read_secret, write_pair
from protocol.errors import KeyFileError, SettingsError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class EnrolledDevice:
    """A device that is let in; the field names are those of ``keys list --json``."""

    name: str
    public_key: str


class KeyFolder:
    """A folder that ``create`` made.

    Args:
        path: the folder.

    Raises:
        KeyFileError: it holds no secret key of a station, or one that is open to others.
    """

    def __init__(self, path: Path) -> None:
        self.secret_key = read_secret(path / "station")
        self.public_path = public_path(path / "station")
        self.public_key = zmq.curve_public(self.secret_key.encode()).decode()
        self._devices = path / "devices"

    @classmethod
    def create(cls, path: Path) -> "KeyFolder":
        """Make a key pair for a station. Devices that are enrolled in the folder already stay so.

        Raises:
            KeyFileError: the folder has a key pair already, or cannot be written.
        """
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
            (path / "devices").mkdir(exist_ok=True)
        except OSError as error:
            raise KeyFileError(f"{error.filename!r} cannot be made: {error.strerror}") from error
        public, secret = zmq.curve_keypair()
        write_pair(path / "station", public.decode(), secret.decode())
        return cls(path)

    def enroll(self, name: str, key: str) -> None:
        """Let a device in.

        Raises:
            SettingsError: the name is not allowed or taken, or the key is enrolled already.
        """
        if not _NAME.fullmatch(name):
            raise SettingsError("the device's name", name, "1 to 64 letters, digits, '.', '_' and '-', no mark first")
        if name in self._names():
            raise SettingsError("the device's name", name, "one that is not enrolled yet; revoke this one first")
        if (known := self.name_of(key)) is not None:
            raise SettingsError("the device's key", key, f"one that is not enrolled yet; this one is {known!r}")
        self._file(key).write_text(f"{name}\n", encoding="ascii")

    def revoke(self, name: str) -> None:
        """Let a device in no more; a running base station ends its sessions.

        Raises:
            SettingsError: no device of that name is enrolled.
        """
        if name not in self._names():
            raise SettingsError("the device's name", name, ", ".join(self._names()) or "none: no device is enrolled")
        for device in self.devices():
            if device.name == name:
                self._file(device.public_key).unlink(missing_ok=True)

    def devices(self) -> list[EnrolledDevice]:
        """All enrolled devices, by name."""
        keys = (
            z85.encode(bytes.fromhex(path.name)).decode()
            for path in self._devices.iterdir()
            if _FILE_NAME.fullmatch(path.name)
        )
        named = [EnrolledDevice(name, key) for key in keys if (name := self.name_of(key)) is not None]
        return sorted(named, key=lambda device: device.name)

    def name_of(self, key: str) -> str | None:
        """The name that a key is enrolled under, now; None where it is not."""
        try:
            return self._file(key).read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.error("no device with this key gets in: %s", error)  # noqa: TRY400 - the reason is one line
            return None

    def _names(self) -> list[str]:
        return [device.name for device in self.devices()]

    def _file(self, key: str) -> Path:
        return self._devices / z85.decode(key).hex()
