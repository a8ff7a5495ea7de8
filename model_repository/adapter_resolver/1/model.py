"""Triton entry of the resolver: tensors to Python values, a ticket or an error back."""

import json

import numpy
import triton_python_backend_utils as pb_utils

from openlora.config import RunConfig
from openlora.errors import Internal, OpenLoRAError
from openlora.processes.parent_watch import watch_from_stub
from openlora.serving.metrics import RefusalMetrics
from openlora.serving.resolve import ResolverStep
from openlora.serving.responder import tensor, triton_error
from openlora.serving.status import StatusReporter
from openlora.serving.triton_metrics import TritonRegistry

LISTS = {"stop_words", "bad_words"}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        run = RunConfig.load()
        watch_from_stub(run.launcher_pid, run.shm_prefix)
        config = json.loads(args["model_config"])
        self._inputs = [entry["name"] for entry in config["input"]]
        self._logger = pb_utils.Logger
        self._step = ResolverStep(run)
        self._refusals = RefusalMetrics(TritonRegistry())
        self._status = StatusReporter(run.socket("status"), "adapter_resolver")
        self._status.report(ready=True)

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            ticket = self._step.resolve(
                self._values(request), json.loads(request.parameters() or "{}"), request.request_id()
            )
        except OpenLoRAError as error:
            self._refusals.count(error)
            return pb_utils.InferenceResponse(error=triton_error(error))
        except Exception as error:  # a fault of ours: said as such, with its name, and written to the log
            self._logger.log_error(f"adapter_resolver: {type(error).__name__}: {error}")
            fault = Internal(f"{type(error).__name__}: {error}")
            self._refusals.count(fault)
            return pb_utils.InferenceResponse(error=triton_error(fault))
        return pb_utils.InferenceResponse(output_tensors=[tensor("ticket", ticket, numpy.object_)])

    def _values(self, request) -> dict:
        """The tensors that were sent, as Python values; a float32 becomes the shortest decimal that it stands for."""
        values = {}
        for name in self._inputs:
            given = pb_utils.get_input_tensor_by_name(request, name)
            if given is None:
                continue
            array = given.as_numpy().reshape(-1)
            if name in LISTS:
                values[name] = [bytes(item) for item in array]
            elif array.dtype == numpy.float32:
                values[name] = float(str(array[0]))
            else:
                values[name] = bytes(array[0]) if array.dtype == numpy.object_ else array[0].item()
        return values
