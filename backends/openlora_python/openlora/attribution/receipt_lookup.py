"""Finding a receipt by what a user has of it: its number, or its request's id."""

from __future__ import annotations

from ..errors import InvalidArgument
from .log import ReceiptLog


def find_receipt(log: ReceiptLog, which: str) -> int:
    """A receipt's number from a number or a request id, with or without 0x. InvalidArgument: neither, or none such."""
    request_id = which.removeprefix("0x")
    if len(request_id) == 64 and set(request_id) <= set("0123456789abcdef"):
        logged = log.get_by_request(request_id)
        if logged is None:
            raise InvalidArgument(f"no receipt of request {request_id}", field="REQUEST_ID")
        return logged.seq
    if not is_number(which):
        raise InvalidArgument(f"{which!r} is neither a number nor 64 hex digits", field="SEQ|REQUEST_ID")
    return int(which)


def is_number(text: str) -> bool:
    """Whether this can be a receipt's number."""
    return text.isdecimal() and len(text) < 19  # what SQLite can number
