"""Triton entry of the attribution step: opens chunks, answers with the ensemble's outputs."""

import functools
from collections.abc import Callable
from typing import Any

import numpy
import triton_python_backend_utils as pb_utils

from openlora.config import RunConfig
from openlora.processes.parent_watch import watch_from_stub
from openlora.serving.attribute import AttributionStep
from openlora.serving.chunk import Chunk
from openlora.serving.responder import Responder, tensor

REPEATED_TENSORS = 1024


class ResponseAnswer(Responder):
    """The sender of one call: one response with FINAL, or FINAL alone."""

    def __init__(self, request: Any, repeated: Callable[..., Any]) -> None:
        super().__init__(request)
        self._repeated = repeated  # `tensor`, remembering

    def send_response(self, chunk: Chunk, receipt: str, *, first: bool) -> None:
        # Last responses leave on another thread, and a tensor must not be written to shared memory by two at once.
        repeated = tensor if receipt else self._repeated
        outputs = [
            tensor("text_output", chunk.text.encode(), numpy.object_),
            tensor("token_ids", list(chunk.token_ids), numpy.int32),
            repeated("finish_reason", chunk.finish_reason.encode(), numpy.object_),
            repeated("num_input_tokens", chunk.num_input_tokens, numpy.uint32),
            repeated("num_output_tokens", len(chunk.token_ids), numpy.uint32),
        ]
        if first:
            outputs.append(tensor("request_id", chunk.request_id.encode(), numpy.object_))
        if chunk.cumulative_logprob is not None:
            outputs.append(tensor("logprobs", chunk.logprobs.encode(), numpy.object_))
            outputs.append(tensor("cumulative_logprob", chunk.cumulative_logprob, numpy.float32))
        if receipt:
            outputs.append(tensor("receipt", receipt.encode(), numpy.object_))
        self.send(outputs, final=True)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        run = RunConfig.load()
        watch_from_stub(run.launcher_pid, run.shm_prefix)
        self._step = AttributionStep(run)
        self._repeated = functools.lru_cache(REPEATED_TENSORS)(tensor)

    def execute(self, requests: list) -> None:
        for request in requests:
            chunk = pb_utils.get_input_tensor_by_name(request, "chunk").as_numpy().flat[0]
            self._step.take(bytes(chunk), request.is_cancelled, ResponseAnswer(request, self._repeated))

    def finalize(self) -> None:
        self._step.close()
