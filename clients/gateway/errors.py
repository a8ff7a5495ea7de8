"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with the status of the typed error."""

from __future__ import annotations

import logging
import math
import re
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from openlora.errors import AdapterInvalid, AdapterNotFound, Internal, InvalidArgument, OpenLoRAError

API_KEY = "api_key"
_FIELD = re.compile(r"([a-z_]+): ")  # the server's messages begin with the field, where there is one
_PARAM = {"text_input": "prompt", "timeout": "timeout_ms"}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it shows in logs

log = logging.getLogger(__name__)


def error_body(error: OpenLoRAError) -> dict[str, Any]:
    """The body that tells `error`; `code` is the stable code of the taxonomy."""
    status = http_status(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": _param(error), "code": error.code}}


def http_status(error: OpenLoRAError) -> int:
    return 401 if error.field == API_KEY else error.http_status


def error_response(error: OpenLoRAError) -> JSONResponse:
    headers = {}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
        headers["Retry-After-Ms"] = str(error.retry_after_ms)
    return JSONResponse(error_body(error), http_status(error), headers)


def _param(error: OpenLoRAError) -> str | None:
    if isinstance(error, AdapterNotFound | AdapterInvalid):
        return "model"
    found = _FIELD.match(error.message) if isinstance(error, InvalidArgument) else None
    field = error.field or (found[1] if found else None)
    return _PARAM.get(field, field) if field else None


def add_error_handlers(app: FastAPI) -> None:
    """Every answer of `app` that is not a success has the shape above."""

    @app.exception_handler(OpenLoRAError)
    async def typed(request: Request, error: OpenLoRAError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_from_validation(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        code = {404: "ROUTE_NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "INVALID_ARGUMENT")
        kind = _TYPES.get(error.status_code, "invalid_request_error")
        place = f"{request.method} {request.url.path}"
        body = {"message": f"[{code}] {place}: {error.detail}", "type": kind, "param": None, "code": code}
        return JSONResponse({"error": body}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("unexpected", exc_info=error)
        return error_response(Internal("the gateway failed; its log says more"))


def _from_validation(first: dict[str, Any]) -> InvalidArgument:
    """One line about the first thing that pydantic did not like."""
    parts = [part for part in first["loc"] if part != "body"]
    if first["type"] != "extra_forbidden":  # after the fields come the names of a union's branches: not a client's
        parts = list(takewhile(lambda part: isinstance(part, int) or (part.isidentifier() and part != "str"), parts))
    loc = ".".join(str(part) for part in parts) or "body"
    place = loc.encode("ascii", "backslashreplace").decode()[:140]  # it may be a name that a client made up
    if first["type"] == "extra_forbidden":
        return InvalidArgument("no such parameter", field=place)
    if first["type"] == "json_invalid":
        return InvalidArgument(f"not JSON: {first['ctx']['error']}", field="body")
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r:.80}"
    return InvalidArgument(message + shown, field=place)
