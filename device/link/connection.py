"""A connection to the base station that is greeted when it has been idle, and made anew when it was lost."""

import logging
import time
from collections.abc import Callable

from device.session.client import Client
from protocol.errors import EdgedraftError

logger = logging.getLogger(__name__)

GREETING_INTERVAL = 10.0
RETRY_INTERVAL = 3.0
_GREETING_TIMEOUT = 5.0
_FRESH_SECONDS = 2.0
_RECENT_SECONDS = GREETING_INTERVAL + _GREETING_TIMEOUT


class Connection:
    """The client of one base station.

    Args:
        connect: opens a link and greets the base station over it.
        clock: seconds, monotonic.
        offline: whether no base station is used, so that none is greeted.
    """

    def __init__(
        self, connect: Callable[[], Client], clock: Callable[[], float] = time.monotonic, offline: bool = False
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._offline = offline
        self._client: Client | None = None
        self._received_at = -_RECENT_SECONDS
        self._lost = False

    @property
    def alive(self) -> bool:
        """Whether the base station answered recently, or none is used."""
        if self._offline:
            return True
        return self._client is not None and self._clock() - self._received_at < _RECENT_SECONDS

    def client(self, may_be_out: bool = False) -> Client:
        """The client; the base station has answered within the last ``_FRESH_SECONDS``.

        With ``may_be_out`` a client that bridges outages is not greeted.

        Raises:
            LinkError: the base station does not answer.
            AdmissionError: the two ends do not know each other's keys.
            FaultError: the base station refuses the draft model.
        """
        try:
            is_new = self._client is None
            client = self._client = self._client or self._connect()
            is_fresh = self._clock() - self._received_at < _FRESH_SECONDS and not is_new
            if self._offline or is_fresh or (may_be_out and client.bridges_outages):
                return client
            if not is_new or not client.is_greeted:
                client.greet(_GREETING_TIMEOUT)
        except EdgedraftError as error:
            self.lose(error)
            raise
        self.mark_received()
        if self._lost:
            logger.info("the base station answers again")
        self._lost = False
        return client

    def keep_alive(self) -> float:
        """Greet the base station where it has been idle; return the seconds until the next call is due."""
        try:
            self.client()
        except EdgedraftError:
            return RETRY_INTERVAL
        return GREETING_INTERVAL

    def mark_received(self) -> None:
        """Note that the base station has just sent something."""
        self._received_at = self._clock()

    def lose(self, error: EdgedraftError) -> None:
        """Drop the connection after an error; the next use makes a new one. Logs the first error alone."""
        if not self._lost:
            logger.warning("%s", error)
        self._lost = True
        self.close()

    def close(self) -> None:
        """Close the link, if there is one."""
        if self._client is not None:
            self._client.close()
            self._client = None
