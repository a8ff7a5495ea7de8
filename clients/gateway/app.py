"""The routes. Everything that needs a decision is next door; everything that needs a judge is behind Triton."""

# No postponed annotations here: FastAPI reads those of the routes, which name things local to `create_app`.

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from openlora.config import RunConfig
from openlora.errors import AdapterNotFound, Unavailable
from openlora.serving.access.policy import ANONYMOUS, AccessPolicy
from openlora.serving.access.signed_login import is_login_token
from openlora.serving.chain import served_chain
from openlora_client import AsyncOpenLoRAClient

from .chat import ChatTemplate
from .errors import add_error_handlers
from .groups import GroupList
from .models import ModelList
from .schemas import ChatBody, CompletionBody, GenerationBody
from .shapes import ChatShape, CompletionShape, Shape
from .stream import answer_streamed, answer_whole
from .translate import Question, chat_question, completion_question

READY_SECONDS = 5.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # what listens everywhere is reached here


@dataclass(frozen=True)
class Caller:
    """Who asks. `key` is None where the policy knows no keys: OpenAI's clients always send one."""

    name: str
    key: str | None


def create_app(run: RunConfig) -> FastAPI:
    """The gateway of one run of the server."""
    settings = run.settings
    host = _ANY_ADDRESS.get(settings.host, settings.host)
    chain = served_chain(run)
    policy = AccessPolicy(run, None if chain is None else chain.holdings)
    models = ModelList(run, policy, chain)
    groups = GroupList(run)
    template = ChatTemplate(run.base.path, run.base.max_model_len, settings.limits.max_tokens)
    client = AsyncOpenLoRAClient(f"{host}:{settings.grpc_port}")
    health = httpx.AsyncClient(base_url=f"http://{host}:{settings.health_port}", timeout=READY_SECONDS, trust_env=False)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client, health:
            yield

    app = FastAPI(title="OpenLoRA gateway", lifespan=lifespan)
    add_error_handlers(app)

    def caller(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> Caller:
        key = credentials.credentials if credentials else None
        if not policy.knows_keys and not is_login_token(key):
            return Caller(ANONYMOUS, None)
        return Caller(policy.caller(key), key)

    async def answer(request: Request, who: Caller, body: GenerationBody, question: Question, kind: type[Shape]) -> Any:
        usage = bool(body.stream and body.stream_options and body.stream_options.include_usage)
        wants_logprobs = "logprobs" in question.options
        shape = kind(question.label, body.model, logprobs=wants_logprobs, usage_in_stream=usage)
        respond = answer_streamed if body.stream else answer_whole
        return await respond(request, client, question, who.key, shape)

    @app.get("/health")
    async def alive() -> dict[str, bool]:
        """That this process answers; whether the node takes requests is `/readyz`."""
        return {"live": True}

    @app.get("/readyz")
    async def ready() -> Response:
        """The launcher's word on engine, journal, receipt log and stubs."""
        try:
            word = await health.get("/readyz")
        except httpx.TransportError as error:
            raise Unavailable(f"the launcher does not answer: {type(error).__name__}") from error
        return Response(word.content, word.status_code, media_type="application/json")

    @app.get("/v1/models")
    async def list_models(who: Annotated[Caller, Depends(caller)]) -> dict[str, Any]:
        entries = models.entries(who.name)
        usable = {entry["id"] for entry in entries}
        return {"object": "list", "data": entries + groups.entries(usable.__contains__)}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str, who: Annotated[Caller, Depends(caller)]) -> dict[str, Any]:
        def may_use(adapter: str) -> bool:
            try:
                return bool(models.entry(who.name, adapter))
            except AdapterNotFound:
                return False

        return groups.entry(name, may_use) or models.entry(who.name, name)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody, who: Annotated[Caller, Depends(caller)]) -> Response:
        return await answer(request, who, body, completion_question(body), CompletionShape)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatBody, who: Annotated[Caller, Depends(caller)]) -> Response:
        question = await asyncio.to_thread(chat_question, body, template)  # tokenizes the prompt
        return await answer(request, who, body, question, ChatShape)

    return app
