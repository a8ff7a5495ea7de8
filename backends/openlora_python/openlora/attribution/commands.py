"""`openlora receipts …`: list, show and verify receipts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openlora.attribution.log import LoggedReceipt, ReceiptLog
from openlora.attribution.log_key import LogKey, load_known_logs, load_log_key
from openlora.attribution.receipt_json import parse_receipt_document
from openlora.attribution.verify import Verification, verify_receipt
from openlora.errors import InvalidArgument, OpenLoRAError, ReceiptInvalid

EXIT_LOG_UNKNOWN = 3

_STATUS = {1: "complete", 2: "cancelled", 3: "error", 4: "aborted"}
_PAGE = 1_000

receipts_app = typer.Typer(help="Receipts: list, show and verify them.", no_args_is_help=True)

StateDir = Annotated[Path, typer.Option(help="The server's state directory.")]
Json = Annotated[bool, typer.Option("--json", help="JSON, one receipt per line.")]


@receipts_app.command("list")
def list_receipts(
    state_dir: StateDir = Path("var"),
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 20,
    as_json: Json = False,
) -> None:
    """The newest receipts, oldest first."""
    with _one_line_errors(), closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        logged = log.list(max(0, log.size() - limit), limit)
        if as_json:
            for one in logged:
                print(json.dumps(log.receipt_json(one.seq)))
            return
        table = Table("seq", "request", "status", "adapters", "in", "out", "price", "ended (UTC)")
        for one in logged:
            table.add_row(*_row(one, log.receipt_json(one.seq)["blobs"]["adapters"]["adapters"]))
        Console().print(table)


@receipts_app.command("show")
def show_receipt(
    which: Annotated[str, typer.Argument(metavar="SEQ|REQUEST_ID")],
    state_dir: StateDir = Path("var"),
    as_json: Json = False,
    salts: Annotated[bool, typer.Option("--salts", help="With the salts, which open the texts' commitments.")] = False,
) -> None:
    """One receipt with its blobs."""
    with _one_line_errors(), closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        document = log.receipt_json(_find(log, which), with_salts=salts)
    if as_json:
        print(json.dumps(document))
        return
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a digest that is cut short is of no use
    for name, value in document.items():
        if name in ("blobs", "salts"):
            for part, content in value.items():
                table.add_row(part, escape(content if name == "salts" else json.dumps(content, indent=1)))
        elif name != "leaf":
            table.add_row(name, escape(str(value)))
    Console().print(table)


@receipts_app.command("verify")
def verify(
    what: Annotated[str | None, typer.Argument(metavar="FILE|-|SEQ", help="A receipt's JSON, or its number.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All receipts of the state directory.")] = False,
    log_key: Annotated[str | None, typer.Option("--log", metavar="KEY", help="The log's key line or its file.")] = None,
    known_logs: Annotated[Path | None, typer.Option(help="A file with the key lines of the logs you trust.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The prompt, to be checked against the receipt.")] = None,
    output_file: Annotated[Path | None, typer.Option(help="The answer, to be checked against the receipt.")] = None,
    state_dir: StateDir = Path("var"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the result.")] = False,
) -> None:
    """Verify receipts offline. Exits 0 when all are valid, 1 when one is not, 3 when no pinned key knows the log."""
    with _one_line_errors():
        if (what is None) != every or (log_key is not None and known_logs is not None):
            raise InvalidArgument("give FILE, -, SEQ or --all, and at most one of --log and --known-logs")
        pin = load_log_key(log_key) if log_key is not None else None
        logs = load_known_logs(known_logs) if known_logs is not None else []
        known = {"0x" + key.log_id.hex(): key for key in logs}
        prompt, output = _text(prompt_file), _text(output_file)
        count, unknown, last = 0, 0, None
        for document in _documents(what, state_dir):
            last = _verify_one(document, pin, known, prompt, output)
            count += 1
            unknown += not last.known
    _print_result(count, unknown, last, as_json)
    if unknown:
        raise typer.Exit(EXIT_LOG_UNKNOWN)


def _verify_one(
    document: dict[str, Any], pin: LogKey | None, known: dict[str, LogKey], prompt: str | None, output: str | None
) -> Verification:
    try:
        return verify_receipt(document, pin or known.get(str(document.get("log_id"))), prompt, output)
    except ReceiptInvalid as error:
        which = f"receipt {document['seq']}: " if type(document.get("seq")) is int else ""
        raise ReceiptInvalid(which + error.message, field=error.field) from error


def _documents(what: str | None, state_dir: Path) -> Iterator[dict[str, Any]]:
    """The receipts to verify: from standard input, a file, or the log of the state directory."""
    if what == "-":
        yield parse_receipt_document(sys.stdin.buffer.read())
    elif what is not None and (Path(what).exists() or not _is_number(what)):
        try:
            content = Path(what).read_bytes()
        except OSError as error:
            raise InvalidArgument(f"can't read {what}: {error.strerror}", field="FILE") from error
        yield parse_receipt_document(content)
    else:
        with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
            if what is not None:
                yield log.receipt_json(int(what))
                return
            for start in range(0, log.size(), _PAGE):
                for one in log.list(start, _PAGE):
                    yield log.receipt_json(one.seq)


def _print_result(count: int, unknown: int, last: Verification | None, as_json: bool) -> None:
    result = "log unknown" if unknown else "valid"
    if as_json:
        print(json.dumps({"receipts": count, "result": result, "log": last.log.line if last else None}))
        return
    console = Console(soft_wrap=True)
    if last is None:
        console.print("the log holds no receipts")
    elif unknown:
        console.print(
            f"[yellow]consistent, log unknown[/]: {count} receipt(s). Pin the log: --log KEY or --known-logs."
        )
    else:
        texts = f", {' and '.join(last.texts)} as committed" if last.texts else ""
        console.print(f"[green]valid[/]: {count} receipt(s) of log {last.log.log_id.hex()[:16]}…{texts}")


def _find(log: ReceiptLog, which: str) -> int:
    """A receipt's number from a number or a request id, with or without 0x."""
    request_id = which.removeprefix("0x")
    if len(request_id) == 64 and set(request_id) <= set("0123456789abcdef"):
        logged = log.get_by_request(request_id)
        if logged is None:
            raise InvalidArgument(f"no receipt of request {request_id}", field="REQUEST_ID")
        return logged.seq
    if not _is_number(which):
        raise InvalidArgument(f"{which!r} is neither a number nor 64 hex digits", field="SEQ|REQUEST_ID")
    return int(which)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 19  # what SQLite can number


def _row(logged: LoggedReceipt, adapters: list[dict[str, Any]]) -> list[str]:
    receipt = logged.receipt
    return [
        str(logged.seq),
        receipt.request_id.hex()[:12] + "…",
        _STATUS[receipt.status],
        " ".join(f"{one['digest'][:8]}×{one['weight'] / 1_000_000:g}" for one in adapters) or "base",
        str(receipt.in_tokens),
        str(receipt.out_tokens),
        str(receipt.price),
        datetime.fromtimestamp(receipt.ended_at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
    ]


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"can't read {path}: {error}") from error


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """An error of ours is one line on standard error and its own exit code."""
    try:
        yield
    except OpenLoRAError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
