"""The page's server: static files and a read-only JSON interface. It writes nothing and asks nobody but the chain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles

from ..errors import OpenLoRAError
from .adapters_view import AdaptersView
from .receipts_view import ReceiptsView
from .settlement_view import SettlementView

STATIC = Path(__file__).parent / "static"
PAGE = 25
LARGEST_PAGE = 200

HEADERS = {
    # Everything from this server, nothing inline; no plug-ins, frames, forms or other bases.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",
}

Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE)]
Place = Annotated[int, Query(ge=0, lt=2**63)]


def create_app(state_dir: Path, settlement: SettlementView) -> FastAPI:
    """The page over one state directory."""
    app = FastAPI(title="OpenLoRA explorer", docs_url=None, redoc_url=None, openapi_url=None)
    receipts, adapters = ReceiptsView(state_dir), AdaptersView(state_dir)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(OpenLoRAError)
    def refuse(_: Request, error: OpenLoRAError) -> JSONResponse:
        return JSONResponse({"error": error.message}, status_code=error.http_status)

    @app.get("/api/overview")
    def overview() -> dict[str, Any]:
        log = receipts.overview() if receipts.exists else None
        return {"log": log, "chain": settlement.overview(log["id"] if log else None)}

    @app.get("/api/receipts")
    def list_receipts(
        before: Place | None = None, limit: Limit = PAGE, adapter: Annotated[str | None, Query(max_length=64)] = None
    ) -> dict[str, Any]:
        if not receipts.exists:
            return {"receipts": [], "before": None, "size": 0}
        page, names = receipts.page(before, limit, adapter), adapters.names()
        for row in page.receipts:
            row["adapters"] = [one | {"name": names.get(one["digest"])} for one in row["adapters"]]
        return {"receipts": page.receipts, "before": page.before, "size": page.size}

    @app.get("/api/requests/{request_id}", response_model=None)
    def find_request(request_id: str) -> dict[str, Any] | JSONResponse:
        known = receipts.exists and len(request_id) == 64 and set(request_id) <= set("0123456789abcdef")
        seq = receipts.number_of(request_id) if known else None
        return {"seq": seq} if seq is not None else JSONResponse({"error": "no such request"}, status_code=404)

    @app.get("/api/receipts/{seq}")
    def receipt(seq: int) -> dict[str, Any]:
        names = adapters.names()
        document = receipts.document(seq)
        used = [one["digest"] for one in document["blobs"]["adapters"]["adapters"]]
        return {"receipt": document, "names": {digest: names[digest] for digest in used if digest in names}}

    @app.get("/api/receipts/{seq}/proof")
    def proof(seq: int) -> PlainTextResponse:
        attachment = {"Content-Disposition": f'attachment; filename="receipt-{seq}.tlog-proof"'}
        return PlainTextResponse(receipts.proof(seq), headers=attachment)

    @app.get("/api/adapters")
    def list_adapters(
        wanted: Annotated[str, Query(max_length=128)] = "", after: Place = 0, limit: Limit = PAGE
    ) -> dict[str, Any]:
        return adapters.page(wanted, after, limit)

    @app.get("/api/earners")
    def earners(
        wanted: Annotated[str, Query(max_length=42)] = "", after: Place = 0, limit: Limit = PAGE
    ) -> dict[str, Any]:
        return settlement.earners(wanted, after, limit)

    @app.get("/api/earners/{account}")
    def earner(account: str) -> dict[str, Any]:
        return settlement.earner(account)

    @app.get("/api/epochs")
    def epochs() -> dict[str, Any]:
        return settlement.epochs()

    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app
