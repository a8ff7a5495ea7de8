"""`openlora keys …`: callers, their API keys and limits. A running server follows from its next request on."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ...access_rule import ADDRESS
from ...command_group import command_group
from ...config import UsageLimits
from ...errors import InvalidArgument, Unavailable
from .caller_store import CallerStore, KeyRecord, check_caller
from .quota import day_of
from .quota_store import load_ledger

CALLERS_FILE = "callers.sqlite"  # below the state directory
QUOTA_FILE = "quota.sqlite"
UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86_400}
StateDir = Annotated[Path, typer.Option("--state-dir", help="Where the server keeps its state.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]
RequestsPerMinute = Annotated[int | None, typer.Option(min=0, max=1_000_000, help="Of the caller, all keys together.")]
TokensPerDay = Annotated[int | None, typer.Option(min=0, help="Prompts and answers of the caller, a UTC day.")]

keys_app = command_group("Callers, their API keys and limits.")


@keys_app.command()
def add(
    caller: Annotated[str, typer.Argument(help="Its name; or its Ethereum address, which then signs its requests.")],
    expires: Annotated[str | None, typer.Option(help="30m, 12h, 90d, or a date: 2027-01-31[T12:00] (UTC).")] = None,
    address: Annotated[str | None, typer.Option(help="Take this address's signature for the caller; no key.")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_day: TokensPerDay = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once. With an address no key is made: its owner signs."""
    expires_at = None if expires is None else _moment(expires)
    if address is None and ADDRESS.fullmatch(caller):
        address = caller
    with _store(state_dir, create=True) as store:
        if address is None:
            record, api_key = store.add_key(caller, expires_at)
        else:
            record, api_key = store.add_address(caller, address, expires_at), None
        _change_limits(store, record.caller, requests_per_minute, tokens_per_day)
        if as_json:
            typer.echo(json.dumps({**_tree(store, record), **({"key": api_key} if api_key else {})}))
            return
    until = "" if expires_at is None else f", until {_date(expires_at)}"
    Console(stderr=True).print(
        f"key {record.id} of {record.caller}{until}: it is shown only now"
        if api_key
        else f"{record.id}: requests signed by {record.proof} are those of {record.caller}{until}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if api_key:
        typer.echo(api_key)


@keys_app.command("list")
def list_keys(
    caller: Annotated[str | None, typer.Option(help="Only this caller's.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Those revoked and expired too.")] = False,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """The keys in force. Nobody can be shown a key again: they are kept as SHA-256."""
    now = time.time()
    with _store(state_dir) as store:
        records = [
            record
            for record in store.records()
            if (every or record.state(now) == "valid") and caller in (None, record.caller)
        ]
        if as_json:
            typer.echo(json.dumps([_tree(store, record) for record in records]))
            return
    table = Table("id", "caller", "key", "state", "made (UTC)", "expires (UTC)", box=None)
    for record in records:
        shown = record.prefix + ("…" if record.kind == "key" else "")
        expires = "" if record.expires_at is None else _date(record.expires_at)
        table.add_row(str(record.id), record.caller, shown, record.state(now), _date(record.created_at), expires)
    Console().print(table if records else "no keys")


@keys_app.command()
def show(
    key_id: Annotated[int, typer.Argument(metavar="ID")],
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """One key: its state, its caller's own limits, and what the caller used today (a few seconds old)."""
    with _store(state_dir) as store:
        record = store.get(key_id)
        tree = _tree(store, record)
    tree["tokens_used_today"] = _used_today(state_dir / QUOTA_FILE, record.caller)
    if as_json:
        typer.echo(json.dumps(tree))
        return
    for name, value in tree.items():
        shown = "" if value is None else _date(value) if name.endswith("_at") else str(value)
        typer.echo(f"{name:>20}  {shown}")


@keys_app.command()
def revoke(
    key_ids: Annotated[list[int], typer.Argument(metavar="ID …")],
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """End keys for ever, all of these or none. Requests that run go on; the next one with such a key is refused."""
    with _store(state_dir) as store:
        records = store.revoke(*key_ids)
        if as_json:
            typer.echo(json.dumps([_tree(store, record) for record in records]))
            return
    for record in records:
        typer.echo(f"key {record.id} of {record.caller}: revoked")


@keys_app.command()
def limit(
    caller: Annotated[str, typer.Argument(help="Its name, with a key or not: `anonymous` is who has none.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_day: TokensPerDay = None,
    clear: Annotated[bool, typer.Option("--clear", help="First drop the limits that it has here.")] = False,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Set or show a caller's own limits. Those in the server's settings win over them."""
    caller = check_caller(caller)
    with _store(state_dir, create=True) as store:
        if clear:
            store.set_limits(caller, UsageLimits())
        _change_limits(store, caller, requests_per_minute, tokens_per_day)
        limits = store.limits(caller).model_dump()
    if as_json:
        typer.echo(json.dumps({"caller": caller, **limits}))
        return
    for name, value in limits.items():
        typer.echo(f"{caller}: {name.replace('_', ' ')}: {'not limited here' if value is None else value}")


@contextmanager
def _store(state_dir: Path, *, create: bool = False) -> Iterator[CallerStore]:
    path = state_dir / CALLERS_FILE
    if not create and not path.exists():
        raise InvalidArgument(f"no callers in {state_dir}: `openlora keys add` makes the first", field="state-dir")
    try:
        with CallerStore(path) as store:
            yield store
    except (sqlite3.Error, OSError) as error:
        raise Unavailable(f"{path}: {error}") from error


def _change_limits(
    store: CallerStore, caller: str, requests_per_minute: int | None, tokens_per_day: int | None
) -> None:
    given = {"requests_per_minute": requests_per_minute, "tokens_per_day": tokens_per_day}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        store.set_limits(caller, store.limits(caller).model_copy(update=given))


def _tree(store: CallerStore, record: KeyRecord) -> dict[str, Any]:
    tree = asdict(record) | {"state": record.state(time.time()), **store.limits(record.caller).model_dump()}
    del tree["proof"]
    return tree


def _used_today(path: Path, caller: str) -> int:
    try:
        saved = load_ledger(path)
    except (sqlite3.Error, ValueError) as error:
        raise Unavailable(f"{path} can't be read: {error}") from error
    return saved.used.get((day_of(time.time()), f"caller:{caller}"), 0)


def _moment(text: str) -> int:
    """Seconds since 1970 of a duration from now on, or of a date."""
    if found := re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text):
        return int(time.time()) + int(found[1]) * UNIT_SECONDS[found[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(f"{text!r:.80}: 30m, 12h, 90d or a date is wanted", field="expires") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
