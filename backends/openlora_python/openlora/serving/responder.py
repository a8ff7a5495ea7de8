"""The one way to answer a Triton request: every path ends in exactly one FINAL, and nothing touches a sender after it.

`is_cancelled()` on a sender after FINAL crashes the whole server, so the sender is dropped there, under the lock.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy
import triton_python_backend_utils as pb_utils

from ..errors import OpenLoRAError


def tensor(name: str, values: list[Any] | Any, dtype: Any) -> Any:
    """A one-dimensional output; STRING tensors are object arrays of bytes."""
    items = values if isinstance(values, list) else [values]
    return pb_utils.Tensor(name, numpy.array(items, dtype=dtype))


def triton_error(error: OpenLoRAError) -> Any:
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.triton_code))


class Responder:
    """Wraps the response sender of one decoupled request."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        return self._sender is None

    def send(self, tensors: list[Any], *, final: bool = False) -> None:
        self._send(pb_utils.InferenceResponse(output_tensors=tensors), final)

    def fail(self, error: OpenLoRAError) -> None:
        """Answer with an error, which is always the last word."""
        self._send(pb_utils.InferenceResponse(error=triton_error(error)), True)

    def finish(self) -> None:
        """A flag-only FINAL: the client sees no response of ours."""
        self._send(None, True)

    def _send(self, response: Any, final: bool) -> None:
        with self._lock:
            if self._sender is None:
                return
            sender = self._sender
            if final:
                self._sender = None
            if response is None:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
