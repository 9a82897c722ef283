"""Errors as HTTP: one table from error classes to status codes, one shape for the body (OpenAI's)."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from headrace.base.errors import (
    CancelledRequestError,
    CapacityError,
    CheckpointError,
    HeadraceError,
    InvalidRequestError,
    ModelNotFoundError,
    TemplateError,
    UnsupportedModelError,
)

STATUS_OF = {
    InvalidRequestError: 400,
    TemplateError: 400,
    CheckpointError: 400,
    UnsupportedModelError: 400,
    ModelNotFoundError: 404,
    CapacityError: 503,
    CancelledRequestError: 503,
    HeadraceError: 500,
}
"""The status of an error is that of the first class among its bases that stands here."""

_STATUS_OF_CODE = {"shutting_down": 503, "engine_stopped": 503, "update_in_progress": 409}
"""Errors whose code says more than their class."""

CLIENT_CLOSED_REQUEST = 499
"""What the log and the metrics call a request whose client left (nginx's number); it is never sent."""


class ApiError(HeadraceError):
    """An error of the protocol itself: it knows its status, the field it is about, and headers that belong to it."""

    def __init__(
        self,
        status: int,
        cause: str,
        remedy: str = "",
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(cause, remedy, code)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})


class ClientDisconnectedError(Exception):
    """The client left; there is nobody to answer."""


def status_of(error: Exception) -> int:
    """The HTTP status of an error; 500 for those that are no `HeadraceError`."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, HeadraceError) and error.code in _STATUS_OF_CODE:
        return _STATUS_OF_CODE[error.code]
    return next((STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF), 500)


def error_body(error: Exception) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}``; says nothing about errors that are not for users."""
    if not isinstance(error, HeadraceError):
        error = HeadraceError("The server failed on this request.", "The server's log has the cause.")
    status = status_of(error)
    detail: dict[str, Any] = {
        "message": str(error),
        "type": _type_of(status),
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    # Quoted input may hold lone surrogates, which only ASCII escapes can carry.
    return json.dumps({"error": detail}).encode()


def error_response(error: Exception) -> Response:
    """The whole answer to a request that failed before anything of it was sent."""
    headers = error.headers if isinstance(error, ApiError) else {}
    return Response(error_body(error), status_of(error), headers, media_type="application/json")


async def answer_headrace_error(_request: Request, error: Exception) -> Response:
    """Exception handler of the application for `HeadraceError`."""
    return error_response(error)


async def answer_routing_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application for paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        cause, code, remedy = f"There is no {what}.", "unknown_url", "GET /openapi.json lists what there is."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        cause, code, remedy = f"{what} is not allowed.", "method_not_allowed", f"Use {allowed}."
    else:
        cause, code, remedy = f"{what}: {error.detail}.", "http_error", ""
    return error_response(ApiError(error.status_code, cause, remedy, code=code, headers=error.headers))


def _type_of(status: int) -> str:
    if status == 429:
        return "overloaded_error"
    return "invalid_request_error" if status < 500 else "server_error"
