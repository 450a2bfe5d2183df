"""A connection to the HTTP service: one of a limited number, which sends requests and reads responses in time."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from device.http.http_errors import HttpError


class HttpConnection(H11Protocol):
    """uvicorn's connection, with limits that uvicorn does not have.

    Attributes:
        max_connections: that are served at once, far fewer than a process may have descriptors.
        request_seconds: from the first byte of a request, or from the connection, to the last byte of the request.
        response_seconds: for which bytes of a response may wait for the client to read.
    """

    max_connections = 128
    request_seconds = 30.0
    response_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _response_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Serve a new connection, or refuse it."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called as soon as bytes have to wait
        if len(self.connections) > self.max_connections:
            self._refuse(HttpError.overloaded(f"{self.max_connections} connections are open already; retry later"))
        else:
            self._set_deadline()

    def handle_events(self) -> None:
        """Process what the client has sent: now, or before the last response was complete."""
        super().handle_events()
        if not self._request_is_incomplete():
            self._clear_deadline()
        elif self._deadline is None:
            self._set_deadline()

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever, also where the connection is being closed."""
        super().pause_writing()
        self._response_deadline = self.loop.call_later(self.response_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read everything."""
        super().resume_writing()
        self._clear_response_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._clear_deadline()
        self._clear_response_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(HttpError(400, msg))

    def _request_is_incomplete(self) -> bool:
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.request_seconds, self._expire)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _clear_response_deadline(self) -> None:
        if self._response_deadline is not None:
            self._response_deadline.cancel()
            self._response_deadline = None

    def _expire(self) -> None:
        self._refuse(HttpError(408, f"the request did not arrive within {self.request_seconds:g} s"))

    def _refuse(self, error: HttpError) -> None:
        """Close the connection; with an answer, unless one has begun."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=error.status, headers=headers)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
