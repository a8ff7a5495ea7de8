"""The Python client of OpenLoRA: streamed answers, typed errors and receipts over Triton's gRPC stream.

>>> with OpenLoRAClient("localhost:8001") as client:
...     for chunk in client.stream("Tell me about the cat.", [("pirate", 0.7), ("shout", 0.3)], max_tokens=32):
...         print(chunk.text, end="", flush=True)
"""

from openlora.errors import (
    AdapterInvalid,
    AdapterNotFound,
    DeadlineExceeded,
    EngineRestarted,
    Internal,
    InvalidArgument,
    NotAuthenticated,
    NotFinite,
    OpenLoRAError,
    Overloaded,
    QuotaExceeded,
    RequestNotFound,
    Unavailable,
)

from .answer import Answer, Chunk, Usage
from .async_client import AsyncChunkStream, AsyncOpenLoRAClient
from .login import login_token, signed_token
from .request import Adapters, SamplingOptions
from .sync_client import ChunkStream, OpenLoRAClient

__all__ = [
    "AdapterInvalid",
    "AdapterNotFound",
    "Adapters",
    "Answer",
    "AsyncChunkStream",
    "AsyncOpenLoRAClient",
    "Chunk",
    "ChunkStream",
    "DeadlineExceeded",
    "EngineRestarted",
    "Internal",
    "InvalidArgument",
    "NotAuthenticated",
    "NotFinite",
    "OpenLoRAClient",
    "OpenLoRAError",
    "Overloaded",
    "QuotaExceeded",
    "RequestNotFound",
    "SamplingOptions",
    "Unavailable",
    "Usage",
    "login_token",
    "signed_token",
]
