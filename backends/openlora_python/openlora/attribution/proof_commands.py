"""`openlora receipts prove | checkpoint | cosign`: proof files, and the checkpoints that they rest on."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from ..config import AttributionSettings, load_section
from ..errors import InvalidArgument, Unavailable
from .checkpoint import verify_checkpoint
from .log import ReceiptLog
from .prove import cosign_newest, newest_note
from .prove import prove as make_proof
from .receipt_lookup import find_receipt
from .witness_client import WitnessAddress, WitnessClient

StateDir = Annotated[Path, typer.Option(help="The server's state directory, or one below its `closed`.")]


def prove(
    which: Annotated[str, typer.Argument(metavar="SEQ|REQUEST_ID")],
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output without it.")] = None,
    salts: Annotated[bool, typer.Option("--salts", help="With the salts, which open the texts' commitments.")] = False,
    state_dir: StateDir = Path("var"),
) -> None:
    """A file that proves a receipt offline: receipt, place in the log's tree, signed checkpoint, cosignatures."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        proof = str(make_proof(log, find_receipt(log, which), with_salts=salts)).encode()
        if out is None:
            typer.echo(proof, nl=False)
            return
        try:
            out.write_bytes(proof)
        except OSError as error:
            raise InvalidArgument(f"can't write {out}: {error.strerror}", field="out") from error


def checkpoint(
    state_dir: StateDir = Path("var"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """The newest checkpoint that the log signed."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        note = newest_note(log)
        if note is None:
            raise Unavailable("the log has no checkpoint yet: a running server signs one about every second")
        found = verify_checkpoint(note, log.key)
        if as_json:
            facts = {"origin": found.origin, "size": found.size, "root": found.root.hex(), "receipts": log.size()}
            typer.echo(json.dumps(facts))
        else:
            typer.echo(str(note).encode(), nl=False)


def cosign(
    witness: Annotated[
        list[str] | None, typer.Option(metavar="'URL VKEY'", help="A witness to ask; repeat for more.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The server's YAML file: its attribution.witnesses.")] = None,
    every: Annotated[float | None, typer.Option(min=0.1, help="Go on, looking for news every so many seconds.")] = None,
    state_dir: StateDir = Path("var"),
) -> None:
    """Ask witnesses to cosign the newest checkpoint. Beside a server: it never waits for witnesses."""
    with ExitStack() as stack:
        lines = [*(witness or []), *load_section(AttributionSettings, config).witnesses]
        if not lines:
            raise InvalidArgument("name witnesses with --witness or --config", field="witness")
        clients = [stack.enter_context(closing(WitnessClient(WitnessAddress.parse(line)))) for line in lines]
        seen = ""
        while True:
            seen = _cosign_once(state_dir, clients, seen, last=every is None)
            if every is None:
                return
            time.sleep(every)


def _cosign_once(state_dir: Path, clients: list[WitnessClient], seen: str, *, last: bool) -> str:
    """Cosign if there is a checkpoint other than `seen`; its text. With `last` no cosignature at all is an error."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        note = newest_note(log)
        if not last and (note is None or note.text == seen):
            return seen
        refused: list[Unavailable] = []
        found = cosign_newest(log, clients, refused.append)
    for error in refused:
        typer.echo(str(error), err=True)
    if found is None:
        if last:
            raise Unavailable("no witness cosigned")
        return seen
    typer.echo(f"{found.text.splitlines()[1]} receipts, {len(clients) - len(refused)} of {len(clients)} witnesses")
    return found.text
