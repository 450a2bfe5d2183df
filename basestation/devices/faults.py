"""Faults as devices are sent them."""

import logging

from basestation.devices.handshake import Handshake
from basestation.devices.peer import Peer
from basestation.monitoring.metrics import Metrics
from protocol.errors import EdgedraftError
from protocol.messages import Fault

logger = logging.getLogger(__name__)


def log_fault(peer: Peer, session_id: int | None, error: EdgedraftError) -> None:
    """Log an error of a peer, with its fields for ``JsonFormatter``."""
    fields = {"peer": peer.owner, "session": session_id, "code": error.code}
    logger.warning("peer %s, session %s: %s", peer, session_id, error, extra=fields)


def counted_fault(
    peer: Peer, session_id: int | None, error: EdgedraftError, handshake: Handshake, metrics: Metrics
) -> Fault:
    """The Fault that tells a peer of an error, in its protocol version; it is counted as sent."""
    metrics.count_fault(peer, error.code, str(error))
    retry_seconds = 0 if handshake.speaks_oldest(peer.owner) else error.retry_seconds
    return Fault(session_id, error.code, str(error), retry_seconds)
