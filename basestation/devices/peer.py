"""A peer: who sent a message, and the connection that replies go to."""

from dataclasses import dataclass

UNNAMED = "(unnamed)"
"""The name of all devices without a key, or without a readable name; no device can be enrolled under it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The sender of a message.

    Attributes:
        owner: who owns the sessions: a device's public key, or without keys its address in hexadecimal.
        address: the connection's ZeroMQ identity.
        name: under which the device is enrolled.
        version: of the protocol that a front agreed with the device; 0 if no front did.
    """

    owner: str
    address: bytes
    name: str = UNNAMED
    version: int = 0

    @classmethod
    def without_key(cls, address: bytes) -> "Peer":
        """A device that is known by its address alone."""
        return cls(address.hex(), address)

    def __str__(self) -> str:
        return self.owner[:8]
