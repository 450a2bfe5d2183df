"""The keys of a device: its own pair, and the base station's public key.

The device proves with its pair who it is; with the station's key it knows that
it talks to that base station and to nobody in between.
"""

from dataclasses import dataclass, field
from pathlib import Path

import zmq

from common.key_files import read_public, read_secret, write_pair


@dataclass(frozen=True)
class LinkKeys:
    """What a device needs for a link with keys."""

    secret: str = field(repr=False)
    station: str

    @classmethod
    def read(cls, path: Path, station: str) -> "LinkKeys":
        """The device's secret key at ``path``, and the station's public key or the file that holds it.

        Raises:
            KeyFileError: a file is missing, damaged or open to others.
            SettingsError: ``station`` is neither a key nor a file.
        """
        return cls(read_secret(path), read_public(station))

    @property
    def public(self) -> str:
        """The device's public key, which is who it is to the base station."""
        return zmq.curve_public(self.secret.encode()).decode()

    def protect(self, dealer: "zmq.Socket[bytes]") -> None:
        """Encrypt what a socket sends, to that base station alone; before it is connected."""
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self.public.encode())
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self.secret.encode())
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self.station.encode())


def new_key(path: Path) -> str:
    """Make a key pair, the secret key in ``path``; gives the public one.

    Raises:
        KeyFileError: the file exists already or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    while public.startswith(b"-"):  # a command line would take it for an option
        public, secret = zmq.curve_keypair()
    write_pair(path, public.decode(), secret.decode())
    return public.decode()
