"""The device's CURVE keys: its own pair, and the base station's public key.

The device authenticates with its pair, and authenticates the base station by its public key.
"""

from dataclasses import dataclass, field
from pathlib import Path

import zmq

from common.key_files import read_public, read_secret, write_pair


@dataclass(frozen=True)
class CurveKeys:
    """The keys of an encrypted link."""

    secret: str = field(repr=False)
    station: str

    @classmethod
    def read(cls, path: Path, station: str) -> "CurveKeys":
        """Read the device's secret key at ``path``, and the station's public key, given as such or as a file.

        Raises:
            KeyFileError: a file is missing, damaged or readable by others.
            SettingsError: ``station`` is neither a key nor a file.
        """
        return cls(read_secret(path), read_public(station))

    @property
    def public(self) -> str:
        """The device's public key, its identity at the base station."""
        return zmq.curve_public(self.secret.encode()).decode()

    def protect(self, dealer: "zmq.Socket[bytes]") -> None:
        """Configure a socket for CURVE; call before it is connected."""
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self.public.encode())
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self.secret.encode())
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self.station.encode())


def public_key(path: Path) -> str:
    """The public key of the secret key at ``path``.

    Raises:
        KeyFileError: the file is missing, damaged or readable by others.
    """
    return zmq.curve_public(read_secret(path).encode()).decode()


def new_key(path: Path) -> str:
    """Write a new key pair, the secret key to ``path``; return the public key.

    Raises:
        KeyFileError: the file exists already or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    while public.startswith(b"-"):  # would look like an option on a command line
        public, secret = zmq.curve_keypair()
    write_pair(path, public.decode(), secret.decode())
    return public.decode()
