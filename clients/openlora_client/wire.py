"""Triton's tensors and errors on one side, `Call`, `Chunk` and typed errors on the other.

A stream carries one request and is closed for sending at once, so its end is the end of the answer, and cancelling
it cancels that request alone. Errors are read from the text of a response. The header `triton_grpc_error`, which turns
them into statuses, is not sent: before Triton 2.68 it makes the server use freed memory, and a few errors kill it.
"""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferResult, service_pb2
from tritonclient.utils import serialize_byte_tensor

from openlora.errors import DeadlineExceeded, Internal, InvalidArgument, OpenLoRAError, Unavailable, from_message

from .answer import Chunk
from .request import Call

MODEL = "openlora"
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted server is found again within a second; gRPC's own back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_DATATYPE = {str: "BYTES", bool: "BOOL"}


def infer_inputs(call: Call) -> list[InferInput]:
    """The inputs as tritonclient's tensors, each of shape [1]."""
    tensors = []
    for name, value in call.inputs.items():
        tensor = InferInput(name, [1], _DATATYPE[type(value)])
        tensor.set_data_from_numpy(_array(name, value))
        tensors.append(tensor)
    return tensors


def infer_message(call: Call) -> service_pb2.ModelInferRequest:
    """The request as Triton's protobuf message."""
    message = service_pb2.ModelInferRequest(model_name=MODEL, id=call.label)
    for name, value in call.inputs.items():
        array = _array(name, value)
        message.inputs.add(name=name, datatype=_DATATYPE[type(value)], shape=[1])
        message.raw_input_contents.append(
            array.tobytes() if isinstance(value, bool) else serialize_byte_tensor(array).item()
        )
    return message


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, bool):
        return np.array([value])  # [1]
    if not isinstance(value, str):
        raise InvalidArgument(f"a string is wanted, got {value!r:.80}", field=name)
    try:
        return np.array([value.encode()], dtype=np.object_)  # [1]
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"not UTF-8: {error.reason} at {error.start}", field=name) from error


class ChunkReader:
    """Reads the responses of one stream; the server tells its request id on the first one only."""

    def __init__(self) -> None:
        self._request_id = ""

    def read(self, result: InferResult) -> Chunk | None:
        """The chunk in a response, or None for one that carries no tensors."""
        if not result.get_response().outputs:
            return None
        self._request_id = _text(result, "request_id") or self._request_id
        token_ids = result.as_numpy("token_ids")  # [tokens] int32
        receipt = _text(result, "receipt")
        logprobs = _text(result, "logprobs")
        return Chunk(
            text=_text(result, "text_output"),
            token_ids=() if token_ids is None else tuple(token_ids.reshape(-1).tolist()),
            finish_reason=_text(result, "finish_reason"),
            num_input_tokens=_number(result, "num_input_tokens"),
            num_output_tokens=_number(result, "num_output_tokens"),
            request_id=self._request_id,
            receipt=json.loads(receipt) if receipt else None,
            logprobs=tuple(json.loads(logprobs)) if logprobs else (),
        )


def _text(result: InferResult, name: str) -> str:
    array = result.as_numpy(name)
    return "" if array is None or not array.size else array.reshape(-1)[0].decode()


def _number(result: InferResult, name: str) -> int:
    array = result.as_numpy(name)
    return 0 if array is None or not array.size else int(array.reshape(-1)[0])


# gRPC statuses of a connection that broke: the server died, closed the stream, or was never there.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


# Triton's own words, which have no code, for a stub that died, a model that is not loaded yet, and a server that ends.
_NOT_SERVING = ("is not healthy", "is not at ready state", "unknown model", "not ready", "shutting down")


def typed_error(error: grpc.RpcError, url: str) -> OpenLoRAError:
    """The typed error behind a call that failed as a whole."""
    details, status = error.details() or "", error.code()
    # A stream that is reset by a dying server is one of gRPC's own INTERNAL or UNKNOWN errors.
    if status in _BROKEN or "RST_STREAM" in details or "Stream removed" in details:
        return Unavailable(f"{url}: {details or status.name}")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{url}: no end of the answer in time")
    return Internal(f"{url}: {status.name}: {details}")


def spoken_error(text: str, url: str) -> OpenLoRAError:
    """The typed error that a response tells: the server's own by its code, and Triton's word on a part that died."""
    found = from_message(text)
    if isinstance(found, Internal) and any(words in text for words in _NOT_SERVING):
        return Unavailable(f"{url}: {text}")
    return found
