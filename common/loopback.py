"""Check whether an address is a loopback address; each end checks before it listens."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(address: str) -> bool:
    """Whether a URL cannot be reached from another machine. Of host names, only ``localhost`` counts as local."""
    try:
        parts = urlsplit(address)
        if parts.scheme in ("ipc", "inproc") or parts.hostname == "localhost":
            return True
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:  # not a numeric address
        return False
