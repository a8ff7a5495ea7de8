"""The witness over HTTP: `POST /add-checkpoint` and `GET /<origin hash>/checkpoint`."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from .witness import MAX_BODY, Answer, Witness


def create_witness_app(witness: Witness) -> FastAPI:
    """The application of one witness."""
    app = FastAPI(title="OpenLoRA witness", openapi_url=None)

    @app.post("/add-checkpoint")
    async def add_checkpoint(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return _response(Answer(400, f"a body has at most {MAX_BODY} bytes\n"))
        return _response(witness.add_checkpoint(body))

    @app.get("/{origin_hash}/checkpoint")
    def checkpoint(origin_hash: str) -> Response:
        return _response(witness.newest(origin_hash))

    return app


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, media_type=answer.content_type)
