"""The synchronous client."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self, Unpack

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from openlora.errors import Internal

from .answer import Answer, Chunk, join
from .request import Adapters, Call, SamplingOptions, generation_call, stop_call
from .wire import CHANNEL_OPTIONS, MODEL, ChunkReader, infer_message, spoken_error, typed_error


class ChunkStream(Iterator[Chunk]):
    """The chunks of one request as they come. Closing it, from any thread, stops the request on the server."""

    def __init__(self, call: grpc.Call, url: str, label: str) -> None:
        self.label = label  # what `OpenLoRAClient.stop` takes
        self._call = call
        self._url = url
        self._reader = ChunkReader()
        self._closed = False

    def __next__(self) -> Chunk:
        while not self._closed:
            try:
                response = next(self._call)
            except StopIteration:
                self._closed = True
                break
            except grpc.RpcError as error:
                if self._closed:
                    break
                self._closed = True
                raise typed_error(error, self._url) from error
            except BaseException:  # Ctrl-C: whoever leaves the loop leaves the answer
                self.close()
                raise
            if response.error_message:
                self._finish()
                raise spoken_error(response.error_message, self._url)
            chunk = self._reader.read(InferResult(response.infer_response))
            if chunk is not None:
                return chunk
        raise StopIteration

    def _finish(self) -> None:
        # An error is the last word: let the server end the stream, which costs it less than a cancel.
        self._closed = True
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass  # the error that came before says more

    def close(self) -> None:
        """Stop the request if it still runs; what it made until then has its receipt in the server's log."""
        if not self._closed:
            self._closed = True
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class OpenLoRAClient:
    """One gRPC channel to the server, one stream a request; may be shared by threads.

    Built on tritonclient's generated stub: its `InferenceServerClient` holds a single stream at a time and leaves a
    thread behind for every stream that is cancelled.
    """

    def __init__(self, url: str = "localhost:8001", api_key: str | None = None) -> None:
        self.url = url
        self._api_key = api_key
        self._channel = grpc.insecure_channel(url, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str,
        adapters: Adapters = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """The whole answer, in one response.

        Args:
            prompt: text, tokenized by the server.
            adapters: which adapters answer, see `Adapters`; None = the base model.
            request_id: a label of your own, for `stop`.
            timeout: seconds until the server gives up; default: the server's setting.
            echo: put the prompt before the answer.
            options: sampling parameters, see `SamplingOptions`.

        Raises:
            OpenLoRAError: the subclass that the server's code stands for; `Unavailable` without a server.
        """
        call = generation_call(
            prompt, adapters, options, stream=False, label=request_id, timeout=timeout, api_key=self._api_key, echo=echo
        )
        with self._open(call) as chunks:
            return join(chunks)

    def stream(
        self,
        prompt: str,
        adapters: Adapters = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> ChunkStream:
        """The answer as it is made. Arguments and errors as for `generate`; the request is sent at once."""
        call = generation_call(
            prompt, adapters, options, stream=True, label=request_id, timeout=timeout, api_key=self._api_key, echo=echo
        )
        return self._open(call)

    def stop(self, request_id: str) -> None:
        """Stop the running request that was given this `request_id`; its stream ends as `cancelled`.

        Raises:
            RequestNotFound: no request of this caller runs under it, or several do.
        """
        with self._open(stop_call(request_id, self._api_key)) as chunks:
            for _ in chunks:
                pass

    def ready(self, timeout: float = 5.0) -> bool:
        """Whether the server is there and takes requests."""
        request = service_pb2.ModelReadyRequest(name=MODEL)
        try:
            return self._stub.ModelReady(request, timeout=timeout).ready
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise typed_error(error, self.url) from error

    def close(self) -> None:
        """Close the channel; what still runs is stopped."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, call: Call) -> ChunkStream:
        try:
            responses = self._stub.ModelStreamInfer(iter([infer_message(call)]), timeout=call.deadline_seconds)
        except ValueError as error:  # gRPC's word for a closed channel
            raise Internal(f"this client is closed: {error}") from error
        return ChunkStream(responses, self.url, call.label)
