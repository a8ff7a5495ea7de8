"""Triton's tensors and errors on one side, `Call`, `Chunk` and typed errors on the other.

A stream carries one request and is closed for sending at once, so its end is the end of the answer, and cancelling
it cancels that request alone.
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
HEADERS = {"triton_grpc_error": "true"}  # without it, errors carry no status code and the stream stays open
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


def typed_error(error: grpc.RpcError, url: str) -> OpenLoRAError:
    """The typed error behind a failed call: the server's own where its text has a code, else what the status says."""
    details = error.details() or ""
    found = from_message(details)
    if not isinstance(found, Internal) or "[INTERNAL]" in details:
        return found
    status = error.code()
    # A dead stub is Triton's own INTERNAL error, and so is a stream reset by a dying server.
    if status in _BROKEN or "is not healthy" in details or "RST_STREAM" in details or "Stream removed" in details:
        return Unavailable(f"{url}: {details or status.name}")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{url}: no end of the answer in time")
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument(details)
    return Internal(f"{status.name}: {details}")
