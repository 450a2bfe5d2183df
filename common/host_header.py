"""The Host header of an HTTP request: a web page that reaches a service through a name of its own shows it there."""

from urllib.parse import urlsplit


def host_name(header: str) -> str | None:
    """The name or address in a Host header, without port and brackets; None where there is none."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
