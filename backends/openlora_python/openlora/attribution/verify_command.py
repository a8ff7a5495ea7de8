"""`openlora receipts verify`: receipts and proof files, offline."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import EXIT_LOG_UNKNOWN, InvalidArgument, ReceiptInvalid
from .log import ReceiptLog
from .log_key import LogKey, load_known_logs, load_log_key
from .proof import ProofVerification, ReceiptProof, is_proof, parse_proof, verify_proof
from .receipt_json import parse_receipt_document
from .receipt_lookup import is_number
from .signed_note import NoteKey
from .verify import Verification, verify_receipt

_PAGE = 1_000


@dataclass(frozen=True)
class _Pins:
    """What the verifier trusts and wants to see."""

    log: LogKey | None
    known: dict[str, LogKey]
    witnesses: Sequence[NoteKey]
    quorum: int
    prompt: str | None
    output: str | None

    def key_of(self, document: dict[str, Any]) -> LogKey | None:
        return self.log or self.known.get(str(document.get("log_id")))


def verify(
    what: Annotated[
        str | None, typer.Argument(metavar="FILE|-|SEQ", help="A receipt's JSON, a proof file, or a number.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All receipts of the state directory.")] = False,
    log_key: Annotated[str | None, typer.Option("--log", metavar="KEY", help="The log's key line or its file.")] = None,
    known_logs: Annotated[Path | None, typer.Option(help="A file with the key lines of the logs you trust.")] = None,
    witness: Annotated[
        list[str] | None, typer.Option(metavar="VKEY", help="A witness whose cosignature a proof must have; repeat.")
    ] = None,
    quorum: Annotated[int | None, typer.Option(min=1, help="How many of these witnesses are enough; all.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The prompt, to be checked against the receipt.")] = None,
    output_file: Annotated[Path | None, typer.Option(help="The answer, to be checked against the receipt.")] = None,
    state_dir: Annotated[Path, typer.Option(help="The server's state directory.")] = Path("var"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the result.")] = False,
) -> None:
    """Verify receipts offline. Exits 0 when all are valid, 1 when one is not, 3 when no pinned key knows the log."""
    if (what is None) != every or (log_key is not None and known_logs is not None):
        raise InvalidArgument("give FILE, -, SEQ or --all, and at most one of --log and --known-logs")
    witnesses = [NoteKey.parse(one) for one in witness or []]
    if quorum is not None and quorum > len(witnesses):
        raise InvalidArgument(f"{quorum} of {len(witnesses)} witnesses", field="quorum")
    logs = load_known_logs(known_logs) if known_logs is not None else []
    pins = _Pins(
        load_log_key(log_key) if log_key is not None else None,
        {"0x" + key.log_id.hex(): key for key in logs},
        witnesses,
        quorum or len(witnesses),
        _text(prompt_file),
        _text(output_file),
    )
    count, unknown, last = 0, 0, None
    proven = None
    for one in _receipts(what, state_dir):
        if isinstance(one, ReceiptProof):
            proven = _verify_proof(one, pins)
            last = proven.receipt
        elif witnesses:
            raise InvalidArgument("only a proof file has cosignatures", field="witness")
        else:
            last = _verify_one(one, pins)
        count += 1
        unknown += not last.known
    _print_result(count, unknown, last, proven, as_json)
    if unknown:
        raise typer.Exit(EXIT_LOG_UNKNOWN)


def _verify_one(document: dict[str, Any], pins: _Pins) -> Verification:
    try:
        return verify_receipt(document, pins.key_of(document), pins.prompt, pins.output)
    except ReceiptInvalid as error:
        which = f"receipt {document['seq']}: " if type(document.get("seq")) is int else ""
        raise ReceiptInvalid(which + error.message, field=error.field) from error


def _verify_proof(proof: ReceiptProof, pins: _Pins) -> ProofVerification:
    found = verify_proof(proof, pins.key_of(proof.document), pins.witnesses, pins.prompt, pins.output)
    if len(found.cosignatures) < pins.quorum:
        raise ReceiptInvalid(f"{len(found.cosignatures)} of them cosigned, {pins.quorum} must", field="witness")
    return found


def _receipts(what: str | None, state_dir: Path) -> Iterator[dict[str, Any] | ReceiptProof]:
    """What to verify: from standard input, a file, or the log of the state directory."""
    if what is not None and (what == "-" or Path(what).exists() or not is_number(what)):
        content = _content(what)
        yield parse_proof(content) if is_proof(content) else parse_receipt_document(content)
        return
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        if what is not None:
            yield log.receipt_json(int(what))
            return
        for start in range(0, log.size(), _PAGE):
            for one in log.list(start, _PAGE):
                yield log.receipt_json(one.seq)


def _content(what: str) -> bytes:
    if what == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(what).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"can't read {what}: {error.strerror}", field="FILE") from error


def _print_result(
    count: int, unknown: int, last: Verification | None, proven: ProofVerification | None, as_json: bool
) -> None:
    result = "log unknown" if unknown else "valid"
    if as_json:
        tree = {}
        if proven is not None:
            names = [one.witness.name for one in proven.cosignatures]
            tree = {"index": last.receipt.seq, "tree_size": proven.checkpoint.size, "witnesses": names}
        print(json.dumps({"receipts": count, "result": result, "log": last.log.line if last else None, **tree}))
        return
    console = Console(soft_wrap=True)
    place = f", leaf {last.receipt.seq} of the {proven.checkpoint.size} that the log signed" if proven else ""
    if proven is not None and proven.cosignatures:
        place += f", cosigned by {', '.join(one.witness.name for one in proven.cosignatures)}"
    if last is None:
        console.print("the log holds no receipts")
    elif unknown:
        console.print(
            f"[yellow]consistent, log unknown[/]: {count} receipt(s){place}. Pin the log: --log KEY or --known-logs."
        )
    else:
        texts = f", {' and '.join(last.texts)} as committed" if last.texts else ""
        console.print(f"[green]valid[/]: {count} receipt(s) of log {last.log.log_id.hex()[:16]}…{place}{texts}")


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"can't read {path}: {error}") from error
