"""Triton entry of the generation step (`backend: "openlora_python"`): copies inputs, hands over, nothing else."""

import numpy
import triton_python_backend_utils as pb_utils

from openlora.config import RunConfig
from openlora.processes.parent_watch import watch_from_stub
from openlora.serving.chunk import Chunk, seal_chunk
from openlora.serving.generate import GenerationStep
from openlora.serving.responder import Responder, tensor
from openlora.serving.seal import Seal
from openlora.serving.triton_metrics import TritonRegistry


class ChunkSink(Responder):
    """A response sender that takes chunks."""

    def __init__(self, request, seal: Seal) -> None:
        super().__init__(request)
        self._seal = seal

    def send_chunk(self, chunk: Chunk, *, final: bool = False) -> None:
        self.send([tensor("chunk", seal_chunk(self._seal, chunk), numpy.object_)], final=final)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        run = RunConfig.load()
        watch_from_stub(run.launcher_pid, run.shm_prefix)
        self._seal = Seal(run.run_key_path, "usage")
        self._step = GenerationStep(run, TritonRegistry())

    def execute(self, requests: list) -> None:
        for request in requests:
            ticket = pb_utils.get_input_tensor_by_name(request, "ticket").as_numpy().flat[0]
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().flat[0]
            self._step.accept(bytes(ticket), bytes(text), ChunkSink(request, self._seal))

    def is_ready(self) -> bool:
        """Asked by servers of 26.03 and later; 2.51 never does, and the launcher's `/readyz` says it there."""
        return not self._step.faults()

    def finalize(self) -> None:
        self._step.close()
