"""Triton entry of the attribution step: opens chunks, answers with the ensemble's outputs."""

import numpy
import triton_python_backend_utils as pb_utils

from openlora.config import RunConfig
from openlora.serving.attribute import AttributionStep
from openlora.serving.chunk import Chunk
from openlora.serving.parent_watch import watch_from_stub
from openlora.serving.responder import Responder, tensor


class ResponseAnswer(Responder):
    """The sender of one call: one response with FINAL, or FINAL alone."""

    def send_response(self, chunk: Chunk, receipt: str) -> None:
        outputs = [
            tensor("text_output", chunk.text.encode(), numpy.object_),
            tensor("request_id", chunk.request_id.encode(), numpy.object_),
            tensor("token_ids", list(chunk.token_ids), numpy.int32),
            tensor("finish_reason", chunk.finish_reason.encode(), numpy.object_),
            tensor("num_input_tokens", chunk.num_input_tokens, numpy.uint32),
            tensor("num_output_tokens", len(chunk.token_ids), numpy.uint32),
        ]
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

    def execute(self, requests: list) -> None:
        for request in requests:
            chunk = pb_utils.get_input_tensor_by_name(request, "chunk").as_numpy().flat[0]
            self._step.take(bytes(chunk), request.is_cancelled(), ResponseAnswer(request))

    def finalize(self) -> None:
        self._step.close()
