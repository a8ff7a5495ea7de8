"""Answers on their way to an HTTP client: whole or as server-sent events, and stopped when nobody is there any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from openlora.errors import OpenLoRAError, Unavailable
from openlora_client import AsyncChunkStream, AsyncOpenLoRAClient, Chunk

from .errors import error_body
from .shapes import Shape
from .translate import Question

REQUEST_ID_HEADER = "x-openlora-request-id"
DONE = "data: [DONE]\n\n"

Result = TypeVar("Result")


async def answer_whole(
    request: Request, client: AsyncOpenLoRAClient, question: Question, api_key: str | None, shape: Shape
) -> Response:
    """The answer in one body.

    Raises:
        OpenLoRAError: what the ensemble said.
        ClientDisconnect: nobody waits for the answer; the request has been cancelled.
    """
    answer = await _while_connected(request, client.generate(**question.arguments(api_key)))
    return JSONResponse(shape.whole(answer), headers={REQUEST_ID_HEADER: answer.request_id})


async def answer_streamed(
    request: Request, client: AsyncOpenLoRAClient, question: Question, api_key: str | None, shape: Shape
) -> Response:
    """The answer as events. It begins with the first chunk, so that an error before it has its own HTTP status.

    Raises:
        OpenLoRAError, ClientDisconnect: as `answer_whole`, until the first chunk.
    """
    chunks = client.stream(**question.arguments(api_key))
    try:
        first = await _while_connected(request, _first(chunks))
    except BaseException:
        chunks.close()
        raise
    return _EventResponse(chunks, first, shape)


class _EventResponse(StreamingResponse):
    """Events from chunks; however it ends, the chunks' stream ends with it."""

    def __init__(self, chunks: AsyncChunkStream, first: Chunk, shape: Shape) -> None:
        headers = {REQUEST_ID_HEADER: first.request_id, "cache-control": "no-cache"}
        super().__init__(_events(chunks, first, shape), media_type="text/event-stream", headers=headers)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # cancels the events when the client disconnects
        finally:
            self._chunks.close()


async def _events(chunks: AsyncChunkStream, first: Chunk, shape: Shape) -> AsyncIterator[str]:
    for body in shape.opening():
        yield _event(body)
    chunk: Chunk | None = first
    finished = False
    try:
        while chunk is not None:
            finished = finished or bool(chunk.finish_reason)
            for body in shape.chunks(chunk):
                yield _event(body)
            chunk = await anext(chunks, None)  # to the very end: a stream left before it counts as cancelled
        if not finished:
            raise Unavailable("the answer was cut off before its end")
    except OpenLoRAError as error:
        yield _event(error_body(error))
    yield DONE


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _first(chunks: AsyncChunkStream) -> Chunk:
    first = await anext(chunks, None)
    if first is None:
        raise Unavailable("the server ended the stream without an answer")
    return first


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client is gone.

    Raises:
        ClientDisconnect: it is gone.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
