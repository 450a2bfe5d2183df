"""Text to token ids and back over HTTP, as llama-server has them: ``/tokenize`` and ``/detokenize``."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from device.http.json_body import json_body
from device.http.request_fields import Fields, field
from device.text.tokenizer import Tokenizer
from device.text.unicode import check_unicode
from protocol.errors import SettingsError


def token_routes(tokenizer: Tokenizer, vocab_size: int) -> list[Route]:
    """The two routes.

    Args:
        tokenizer: of the bundle.
        vocab_size: its number of tokens.
    """

    async def tokenize(request: Request) -> Response:
        text = field(await _object(request), "content", str, "", "a text")
        check_unicode("content", text)
        return JSONResponse({"tokens": await run_in_threadpool(tokenizer.encode, text) if text else []})

    async def detokenize(request: Request) -> Response:
        token_ids = field(await _object(request), "tokens", list, [], "a list of token ids")
        if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in token_ids):
            raise SettingsError("tokens", token_ids, f"token ids from 0 to {vocab_size - 1}")
        return JSONResponse({"content": await run_in_threadpool(tokenizer.decode, token_ids)})

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


async def _object(request: Request) -> Fields:
    fields = await json_body(request)
    if not isinstance(fields, dict):
        raise SettingsError("the request", fields, "a JSON object")
    return fields
