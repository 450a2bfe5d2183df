"""Whether other machines can reach an address; each end asks before it listens."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(address: str) -> bool:
    """Whether no other machine can reach a URL. Other names than ``localhost`` are not trusted to be local."""
    try:
        parts = urlsplit(address)
        if parts.scheme in ("ipc", "inproc") or parts.hostname == "localhost":
            return True
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:  # no address in numbers
        return False
