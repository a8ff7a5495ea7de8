"""The one error taxonomy: what a client, the CLI and the HTTP gateway are told.

Every message starts with a stable code in brackets, because Triton's own codes do not reach all clients
(HTTP generate answers 400 for everything, gRPC streams carry text only unless asked for the code).
"""

from __future__ import annotations

import re
from typing import ClassVar

EXIT_LOG_UNKNOWN = 3  # of `openlora receipts verify`: nothing is wrong, but no pinned key knows the receipt's log
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it


class OpenLoRAError(Exception):
    """Base of every error that may reach a user: `[CODE] field: message retry_after_ms=N`."""

    code: ClassVar[str] = "INTERNAL"
    triton_code: ClassVar[str] = "INTERNAL"  # a member of pb_utils.TritonError
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        place = f"{self.field}: " if self.field else ""
        retry = f" retry_after_ms={self.retry_after_ms}" if self.retry_after_ms is not None else ""
        return f"[{self.code}] {place}{self.message}{retry}"


class Internal(OpenLoRAError):
    """A fault of ours."""


class InvalidArgument(OpenLoRAError):
    """The request can't be right as it stands; `field` names what to change."""

    code = "INVALID_ARGUMENT"
    triton_code = "INVALID_ARG"
    http_status = 400
    exit_code = 2


class AdapterNotFound(OpenLoRAError):
    """No such adapter, or the caller may not know that it exists: the same words for both."""

    code = "ADAPTER_NOT_FOUND"
    triton_code = "NOT_FOUND"
    http_status = 404
    exit_code = 4


class AdapterInvalid(OpenLoRAError):
    """The adapter is known and refused: wrong base, rank, keys, numbers or files. It stays quarantined."""

    code = "ADAPTER_INVALID"
    triton_code = "INVALID_ARG"
    http_status = 422
    exit_code = 4


class UnsupportedModel(OpenLoRAError):
    """The base model's architecture is not supported, or the engine's self-check failed on it."""

    code = "UNSUPPORTED_MODEL"
    triton_code = "UNSUPPORTED"
    http_status = 422
    exit_code = 5


class RequestNotFound(OpenLoRAError):
    """`stop` named no running request of this caller, or more than one."""

    code = "REQUEST_NOT_FOUND"
    triton_code = "NOT_FOUND"
    http_status = 404
    exit_code = 4


class NotAuthenticated(OpenLoRAError):
    """A hand-over between steps that the step before did not make: missing, forged, expired or used."""

    code = "NOT_AUTHENTICATED"
    triton_code = "INVALID_ARG"
    http_status = 403
    exit_code = 6


class Overloaded(OpenLoRAError):
    """The bounded queue is full; try again later."""

    code = "OVERLOADED"
    triton_code = "UNAVAILABLE"
    http_status = 429
    exit_code = 7


class QuotaExceeded(OpenLoRAError):
    """More than the caller or the adapter is granted: requests a minute, or tokens a day. Nothing was accepted."""

    code = "QUOTA_EXCEEDED"
    triton_code = "UNAVAILABLE"
    http_status = 429
    exit_code = 7


class Unavailable(OpenLoRAError):
    """A part of the node is not ready; nothing was accepted."""

    code = "UNAVAILABLE"
    triton_code = "UNAVAILABLE"
    http_status = 503
    exit_code = 7


class EngineRestarted(OpenLoRAError):
    """The engine died while this request ran; what was generated until then has its receipt."""

    code = "ENGINE_RESTARTED"
    triton_code = "UNAVAILABLE"
    http_status = 503
    exit_code = 7


class DeadlineExceeded(OpenLoRAError):
    """The request ran past its deadline and was stopped."""

    code = "DEADLINE_EXCEEDED"
    triton_code = "CANCELLED"
    http_status = 504
    exit_code = 8


class NotFinite(OpenLoRAError):
    """The model produced NaN or Inf for this request; its neighbours go on."""

    code = "NOT_FINITE"
    triton_code = "INTERNAL"
    http_status = 500
    exit_code = 1


class ReceiptInvalid(OpenLoRAError):
    """A receipt that does not verify."""

    code = "RECEIPT_INVALID"
    triton_code = "INVALID_ARG"
    http_status = 422
    exit_code = 1


class ChainMismatch(OpenLoRAError):
    """The chain, or a contract on it, is not the one that the deployment file names."""

    code = "CHAIN_MISMATCH"
    triton_code = "UNAVAILABLE"
    http_status = 503
    exit_code = 9


class ContractRefused(OpenLoRAError):
    """A contract reverted: the message is its error with its values."""

    code = "CONTRACT_REFUSED"
    triton_code = "INVALID_ARG"
    http_status = 422
    exit_code = 10


class SettlementDiffers(OpenLoRAError):
    """A proposed epoch is not what the receipts and the chain give: nobody should attest it."""

    code = "SETTLEMENT_DIFFERS"
    triton_code = "INVALID_ARG"
    http_status = 422
    exit_code = 11


class LogConflict(OpenLoRAError):
    """The receipt log is not what was anchored or signed of it: restored, copied or changed. Nothing goes over it."""

    code = "LOG_CONFLICT"
    triton_code = "UNAVAILABLE"
    http_status = 503
    exit_code = 12


def _subclasses(root: type[OpenLoRAError]) -> dict[str, type[OpenLoRAError]]:
    return {kind.code: kind for kind in root.__subclasses__()}


_MESSAGE = re.compile(r"\[(?P<code>[A-Z_]+)\] (?P<message>.*?)(?: retry_after_ms=(?P<retry>\d+))?$", re.DOTALL)


def from_message(text: str) -> OpenLoRAError:
    """The typed error inside a server message, wherever the code stands in it (Triton prefixes its own words)."""
    found = _MESSAGE.search(text)
    kind = _subclasses(OpenLoRAError).get(found["code"]) if found else None
    if kind is None:
        return Internal(text)
    return kind(found["message"], retry_after_ms=int(found["retry"]) if found["retry"] else None)
