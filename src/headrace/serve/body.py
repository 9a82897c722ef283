"""Reading a request's body: its type, its size, its JSON, its fields."""

import asyncio
import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from headrace.serve import protocol
from headrace.serve.errors import ApiError, ClientDisconnectedError

Model = TypeVar("Model", bound=BaseModel)

LARGE_BODY = 64 << 10
"""Bytes from which on a body is worked on in another thread, for the sake of the streams on the event loop."""

BODY_SECONDS = 60.0
"""How long a body may take to arrive."""

_SHOWN_INPUT = 80


async def read_json(request: Request, kind: type[Model], max_bytes: int) -> tuple[Model, int]:
    """The body as a `kind`, and its size in bytes.

    Raises:
        ApiError: wrong content type (415), too long (413), too slow (408), not JSON or not a `kind` (400).
        ClientDisconnectedError: the client left while sending.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        found = f"{media_type!r}" if media_type else "missing"
        cause = f"The Content-Type is {found}, not application/json."
        raise ApiError(415, cause, "Send the header Content-Type: application/json.", code="unsupported_media_type")
    try:
        body = await asyncio.wait_for(_read(request, max_bytes), BODY_SECONDS)
    except TimeoutError:
        cause = f"The body did not arrive within {BODY_SECONDS:g} seconds."
        raise ApiError(408, cause, code="request_timeout", headers={"connection": "close"}) from None
    try:
        if len(body) < LARGE_BODY:
            return kind.model_validate_json(body), len(body)
        return await asyncio.to_thread(kind.model_validate_json, body), len(body)
    except ValidationError as error:
        raise explain(error, kind) from None


def explain(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """The first thing that is wrong with a body, as cause and remedy, naming the field."""
    detail = error.errors(include_url=False)[0]
    path = [str(part)[:_SHOWN_INPUT] for part in detail["loc"]]
    if detail["type"] == protocol.UNKNOWN_FIELD:
        path.append(detail["ctx"]["field"][:_SHOWN_INPUT])
    param = ".".join(path) or None
    match detail["type"]:
        case "json_invalid":
            cause, remedy, code = f"The body is not valid JSON ({detail['ctx']['error']}).", "", "invalid_json"
        case "missing":
            cause, remedy, code = f"The field {param!r} is missing.", "Add it.", "missing_field"
        case protocol.UNKNOWN_FIELD:
            near = difflib.get_close_matches(path[-1], kind.model_fields, n=1) if len(path) == 1 else []
            remedy = f"Did you mean {near[0]!r}?" if near else "Remove it."
            cause, code = f"The field {param!r} is unknown.", "unknown_field"
        case "none_required":
            cause, remedy, code = f"This server does not support {param!r}.", "Leave it out.", "unsupported_field"
        case "too_short":
            cause, remedy, code = f"{param}: should not be empty.", "", "invalid_value"
        case _:
            found = "" if detail["type"] == "value_error" else f", not {_shown(detail['input'])}"
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
            cause, remedy, code = f"{param or 'The body'}: {message}{found}.", "", "invalid_value"
    return ApiError(400, cause, remedy, code=code, param=param)


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_long(max_bytes)
    chunks, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            raise _too_long(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_long(max_bytes: int) -> ApiError:
    cause = f"The body is longer than {max_bytes} bytes."
    remedy = "Send less, or start the server with a larger --max-body."
    # The rest of the body is still on its way, so that the connection cannot be used again.
    return ApiError(413, cause, remedy, code="body_too_large", headers={"connection": "close"})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_INPUT else text[:_SHOWN_INPUT] + "…"
