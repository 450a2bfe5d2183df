"""The JSON body of a request, limited in its length."""

import json
from typing import Any

from starlette.requests import Request

from device.http.http_errors import HttpError
from device.http.request_fields import check_depth

_MAX_BODY_BYTES = 4 * 1024 * 1024


async def json_body(request: Request) -> Any:
    """The parsed body.

    Raises:
        HttpError: it is not JSON, or too long.
        SettingsError: it is nested too deep.
    """
    try:
        value = json.loads(await _body(request))
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from error
    check_depth("the request", value)
    return value


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY_BYTES:
            raise HttpError(413, f"the body is longer than {_MAX_BODY_BYTES} bytes")
    return bytes(body)
