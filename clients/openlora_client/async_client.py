"""The asynchronous client, over `tritonclient.grpc.aio`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from .answer import Answer, Chunk, join
from .request import Adapters, Call, SamplingOptions, generation_call, stop_call
from .wire import CHANNEL_OPTIONS, MODEL, ChunkReader, infer_inputs, spoken_error, typed_error


class AsyncChunkStream(AsyncIterator[Chunk]):
    """The chunks of one request as they come. Closing it, or cancelling the task that waits for a chunk, stops it."""

    def __init__(self, responses: Any, url: str, label: str) -> None:
        self.label = label  # what `AsyncOpenLoRAClient.stop` takes
        self._responses = responses
        self._url = url
        self._reader = ChunkReader()
        self._closed = False

    async def __anext__(self) -> Chunk:
        while not self._closed:
            try:
                result, error = await anext(self._responses)
            except StopAsyncIteration:
                self._closed = True
                break
            except grpc.RpcError as failure:
                if self._closed:
                    break
                self._closed = True
                raise typed_error(failure, self._url) from failure
            except asyncio.CancelledError:
                # Either our task was cancelled, or another one closed the stream under us.
                task = asyncio.current_task()
                if self._closed and not (task is not None and task.cancelling()):
                    break
                self.close()
                raise
            if error is not None:
                await self._finish()
                raise spoken_error(str(error.message()), self._url)
            chunk = self._reader.read(result)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def _finish(self) -> None:
        # An error is the last word: let the server end the stream, which costs it less than a cancel.
        self._closed = True
        try:
            async for _ in self._responses:
                pass
        except grpc.RpcError:
            pass  # the error that came before says more

    def close(self) -> None:
        """Stop the request if it still runs; what it made until then has its receipt in the server's log."""
        if not self._closed:
            self._closed = True
            self._responses.cancel()

    async def aclose(self) -> None:
        """`close`, under the name that async iterators have for it."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An `async for` that was left does not close its iterator, and gRPC keeps an unfinished call alive.
        self.close()


class AsyncOpenLoRAClient:
    """One gRPC channel to the server, one stream a request. Belongs to the event loop that it is first used in."""

    def __init__(self, url: str = "localhost:8001", api_key: str | None = None) -> None:
        self.url = url
        self._api_key = api_key
        self._client: InferenceServerClient | None = None  # a channel wants a running loop, so it waits for one

    async def generate(
        self,
        prompt: str,
        adapters: Adapters = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        echo: bool = False,
        api_key: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """The whole answer, in one response.

        Args:
            prompt: text, tokenized by the server.
            adapters: which adapters answer, see `Adapters`; None = the base model.
            request_id: a label of your own, for `stop`.
            timeout: seconds until the server gives up; default: the server's setting.
            echo: put the prompt before the answer.
            api_key: of this request; default: the client's.
            options: sampling parameters, see `SamplingOptions`.

        Raises:
            OpenLoRAError: the subclass that the server's code stands for; `Unavailable` without a server.
        """
        key = self._api_key if api_key is None else api_key
        call = generation_call(
            prompt, adapters, options, stream=False, label=request_id, timeout=timeout, api_key=key, echo=echo
        )
        async with self._open(call) as chunks:
            return join([chunk async for chunk in chunks])

    def stream(
        self,
        prompt: str,
        adapters: Adapters = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        echo: bool = False,
        api_key: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncChunkStream:
        """The answer as it is made. Arguments and errors as for `generate`; call it inside the event loop."""
        key = self._api_key if api_key is None else api_key
        call = generation_call(
            prompt, adapters, options, stream=True, label=request_id, timeout=timeout, api_key=key, echo=echo
        )
        return self._open(call)

    async def stop(self, request_id: str) -> None:
        """Stop the running request that was given this `request_id`; its stream ends as `cancelled`.

        Raises:
            RequestNotFound: no request of this caller runs under it, or several do.
        """
        async with self._open(stop_call(request_id, self._api_key)) as chunks:
            async for _ in chunks:
                pass

    async def ready(self, timeout: float = 5.0) -> bool:
        """Whether the server is there and takes requests."""
        try:
            return await self._connected().is_model_ready(MODEL, client_timeout=timeout)
        except InferenceServerException as error:
            if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                return False
            raise spoken_error(str(error.message()), self.url) from error

    async def close(self) -> None:
        """Close the channel; what still runs is stopped."""
        if self._client is not None:
            await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self) -> InferenceServerClient:
        if self._client is None:
            self._client = InferenceServerClient(self.url, channel_args=CHANNEL_OPTIONS)
        return self._client

    def _open(self, call: Call) -> AsyncChunkStream:
        request = {"model_name": MODEL, "inputs": infer_inputs(call), "request_id": call.label}

        async def only_request() -> AsyncIterator[dict[str, Any]]:
            yield request

        responses = self._connected().stream_infer(only_request(), stream_timeout=call.deadline_seconds)
        return AsyncChunkStream(responses, self.url, call.label)
