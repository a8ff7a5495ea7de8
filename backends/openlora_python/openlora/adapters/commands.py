"""`openlora adapters …`: the catalog from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, TaskID
from rich.table import Table
from rich.text import Text

from ..command_group import command_group
from ..config import EngineSettings, load_section
from ..errors import AdapterNotFound, InvalidArgument
from ..progress import progress_bars
from .adapter_spec import AdapterSpec, parse_adapters
from .catalog import Catalog, check_name
from .catalog_file import CATALOG_FILE
from .catalog_reader import CatalogReader
from .catalog_rows import AdapterFilter, AdapterRecord, BaseFacts
from .ingest import ingest
from .ingest_jobs import check_result, fetch_evicted, job_of
from .ingest_worker import CACHE_DIRECTORY, Copied, Downloaded, Event, IngestResult
from .lora_config import parse_object
from .manifest import model_manifest
from .merge import ModuleMerged, merge_record
from .merge import merge as merge_adapters
from .merge_plan import METHODS, MergeLimits
from .missing_files import MERGE_PREFIX
from .printable import printable
from .sources import SourceLimits
from .store import MAX_CARD_BYTES

HASH_CACHE_FILE = "digests.json"  # below the state directory
PAGE_NAMES = 100  # of `list` on a terminal
METHODS_HELP = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
StateDir = Annotated[Path, typer.Option("--state-dir", help="Where the server keeps its state.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The server's YAML file, for its limits.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]

adapters_app = command_group("The adapters that this node knows.")


@adapters_app.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH|URI", help="A PEFT adapter directory: here, or at http(s)://, s3://, gs://, hf://."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Its name; default: the folder's.")] = None,
    digest: Annotated[str, typer.Option(help="The only one that is taken: 64 hex digits.")] = "",
    lazy: Annotated[
        bool,
        typer.Option(
            "--lazy",
            help="Check all but the weights, which come when a request asks for them; for a URI with --digest.",
        ),
    ] = False,
    model: Annotated[Path | None, typer.Option(help="Base model; default: the one served from this state.")] = None,
    config: ConfigFile = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Copy an adapter into the node, check it against the base model, and make it available under its name.

    With --lazy it is available at once, too, and its weights come just in time.
    """
    job = job_of(source, name, digest, lazy)
    with _progress_bar() as follow:
        (result,) = ingest(state_dir, _base(state_dir, model), [job], follow, load_section(SourceLimits, config))
    if as_json:
        typer.echo(msgspec.json.encode(result))
    check_result(result)
    if not as_json:
        typer.echo(f"{result.name} version {result.version}: {result.change} ({result.digest[:16]}…)")


@adapters_app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME …]", help="Default: all that are gone.")] = None,
    config: ConfigFile = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Bring files that are not in the cache (lazy, or evicted) from where they come from, before a request has to."""
    with _progress_bar() as follow:
        results = fetch_evicted(
            state_dir, _base(state_dir, None), names or [], follow, load_section(SourceLimits, config)
        )
    if as_json:
        typer.echo(msgspec.json.encode(results))
    else:
        for result in results:
            if result.status == "ready":
                typer.echo(f"{result.name} version {result.version}: fetched ({result.digest[:16]}…)")
            else:
                typer.echo(f"{result.name}: {result.status}: {printable(result.reason)}")
    for result in results:
        check_result(result)


@adapters_app.command("list")
def list_adapters(
    name: Annotated[str | None, typer.Option(help="Only names like this: * any text, ? one character, [a-c].")] = None,
    status: Annotated[str | None, typer.Option(help="Only ready or quarantined versions.")] = None,
    target: Annotated[str | None, typer.Option(metavar="MODULE", help="Only what changes it, like q_proj.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Only pinned names.")] = False,
    after: Annotated[str, typer.Option(metavar="NAME", help="Go on after this name.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Names at a time; default: {PAGE_NAMES} on a terminal, else all.")
    ] = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Adapters by name, with all versions that aren't removed."""
    with CatalogReader(state_dir / CATALOG_FILE) as reader:
        if status not in (None, "ready", "quarantined"):
            raise InvalidArgument(f"ready or quarantined is wanted, got {status!r:.80}", field="status")
        if limit is None and not as_json and sys.stdout.isatty():
            limit = PAGE_NAMES
        page = reader.page(AdapterFilter(name, status, target, pinned), after, limit)
        if as_json:
            typer.echo(json.dumps([_as_tree(record, state_dir) for record in page.records]))
            return
        Console().print(_table_of(page.records) if page.records else "no adapters")
        if page.more:
            typer.echo(f"there are more: repeat this with --after {page.records[-1].name}", err=True)


@adapters_app.command()
def show(
    name: Annotated[str, typer.Argument()],
    version: Annotated[str | None, typer.Option(help="Number or first digits of the digest; default: current.")] = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """One adapter, quarantined ones included."""
    with CatalogReader(state_dir / CATALOG_FILE) as reader:
        tree = _as_tree(reader.find(name, version), state_dir)
        if as_json:
            typer.echo(json.dumps(tree))
            return
        for key, value in tree.items():
            shown = json.dumps(value) if isinstance(value, dict | list | tuple) else printable(str(value))
            typer.echo(f"{key:>15}  {shown}")


@adapters_app.command()
def use(
    name: Annotated[str, typer.Argument()],
    version: Annotated[str, typer.Argument(help="Number or first digits of the digest, an older one as well.")],
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Make a version the current one: it answers for the bare name from the next request on."""
    with _catalog_with(name, state_dir) as catalog:
        check_name(name)
        record = catalog.use(name, version)
        if as_json:
            typer.echo(json.dumps(_as_tree(record, state_dir)))
            return
        typer.echo(f"{name} version {record.version} is current ({record.digest[:16]}…)")


@adapters_app.command()
def pin(name: Annotated[str, typer.Argument()], state_dir: StateDir = Path("var")) -> None:
    """Keep the current version of a name in memory, whichever that is."""
    with _catalog_with(name, state_dir) as catalog:
        catalog.pin(name)
        typer.echo(f"{name}: pinned")


@adapters_app.command()
def unpin(name: Annotated[str, typer.Argument()], state_dir: StateDir = Path("var")) -> None:
    """Let a name leave memory like all others."""
    with _catalog_with(name, state_dir) as catalog:
        catalog.pin(name, False)
        typer.echo(f"{name}: not pinned")


@adapters_app.command()
def remove(
    name: Annotated[str, typer.Argument()],
    version: Annotated[int | None, typer.Option(help="Only this version.")] = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Take an adapter, or one version, out of the catalog. Requests that run with it go on."""
    with _catalog_with(name, state_dir) as catalog:
        check_name(name)
        gone = catalog.remove(name, version)
        if as_json:
            typer.echo(json.dumps([{"name": record.name, "version": record.version} for record in gone]))
            return
        for record in gone:
            back = f"; the next start of the server brings it back from {record.source}" if record.origin else ""
            typer.echo(f"{record.name} version {record.version}: removed{back}")
        left = catalog.current(name, "")
        if left is not None and any(record.current for record in gone):
            typer.echo(f"{name} version {left.version} is current now")


@adapters_app.command()
def merge(
    source: Annotated[list[str], typer.Argument(metavar="NAME[@VERSION][=WEIGHT] …", help="What to merge.")],
    name: Annotated[str, typer.Option(help="Of the new adapter.")],
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = "cat",
    density: Annotated[float | None, typer.Option(help="Part of the entries that stays (ties, dare, prune).")] = None,
    majority_sign: Annotated[str | None, typer.Option(help="total (default) or frequency (ties).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random masks (dare); default 0.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the result (svd); default: the sources' highest.")] = None,
    card: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Terms of the new adapter, like openlora.json.")
    ] = None,
    config: ConfigFile = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Make a new adapter of several. What was merged before is found, not computed again."""
    terms = None if card is None else parse_object(card.read_bytes(), str(card), MAX_CARD_BYTES)
    with _module_bar() as follow:
        merged = merge_adapters(
            state_dir,
            _base(state_dir, None),
            name,
            _sources(source),
            method,
            density=density,
            majority_sign=majority_sign,
            seed=seed,
            rank=rank,
            card=terms,
            limits=load_section(MergeLimits, config),
            cache=load_section(SourceLimits, config),
            progress=follow,
        )
    if as_json:
        typer.echo(msgspec.json.encode(merged))
        return
    how = "" if merged.computed else ", merged before"
    facts = f"{merged.digest[:16]}…, rank {merged.rank}{how}"
    typer.echo(f"{merged.name} version {merged.version}: {merged.change} ({facts})")


def _sources(texts: list[str]) -> tuple[AdapterSpec, ...]:
    """`NAME[@VERSION][=WEIGHT]` by the rules of a request's `adapters`."""
    entries: list[dict[str, Any]] = []
    for text in texts:
        label, equals, weight = text.partition("=")
        name, at, version = label.partition("@")
        try:
            entries.append({"name": name, "weight": float(weight) if equals else 1.0})
        except ValueError:
            raise InvalidArgument(f"{text!r:.140}: a number is wanted after '='", field="adapters") from None
        if at:
            entries[-1]["version"] = version
    return parse_adapters(json.dumps(entries))


def _base(state_dir: Path, model: Path | None) -> BaseFacts:
    """The base model of this state directory; `model` names it for one that no server has used yet."""
    with Catalog(state_dir / CATALOG_FILE) as catalog:
        known = catalog.base()
        if model is None:
            if known is None:
                raise InvalidArgument("no server has run with this state directory: give --model DIR", field="model")
            return known
        digest = model_manifest(model, state_dir / HASH_CACHE_FILE).digest
        if known is None:
            known = BaseFacts(str(model.resolve()), digest, EngineSettings().max_rank)
            catalog.set_base(known)
        elif known.digest != digest:
            raise InvalidArgument(
                f"{model} is {digest[:16]}…, this state directory serves {known.digest[:16]}… ({known.path})",
                field="model",
            )
        return known


@contextmanager
def _catalog_with(name: str, state_dir: Path) -> Iterator[Catalog]:
    """The catalog to change `name` in; asking for one that is not there makes none."""
    path = state_dir / CATALOG_FILE
    if not path.is_file():
        raise AdapterNotFound(f"no adapter {name!r}")
    with Catalog(path) as catalog:
        yield catalog


@contextmanager
def _progress_bar() -> Iterator[Callable[[Event], None]]:
    with progress_bars(DownloadColumn()) as bar:
        task = bar.add_task("checking the base model", total=None)
        downloads: dict[str, TaskID] = {}

        def follow(event: Event) -> None:
            if isinstance(event, Downloaded):
                if event.name not in downloads:
                    downloads[event.name] = bar.add_task(f"downloading {event.name}")
                bar.update(downloads[event.name], completed=event.done, total=event.total)
            elif isinstance(event, Copied):
                bar.update(task, description=f"copying {event.name}", completed=event.done, total=event.total)
            elif isinstance(event, IngestResult):
                bar.update(task, description=f"{event.name}: {event.status}")

        yield follow


@contextmanager
def _module_bar() -> Iterator[Callable[[ModuleMerged], None]]:
    with progress_bars(MofNCompleteColumn()) as bar:
        task = bar.add_task("merging", total=None)

        def follow(event: ModuleMerged) -> None:
            bar.update(task, description=f"merged {event.module}", completed=event.done, total=event.total)

        yield follow


def _table_of(records: list[AdapterRecord]) -> Table:
    table = Table("name", "version", "rank", "modules", "digest", "status", box=None)
    for record in records:
        version = f"{record.version} current" if record.current else str(record.version)
        status = f"{record.status}: {record.reason}" if record.reason else record.status
        cells = (
            record.name,
            version,
            str(record.rank or ""),
            ", ".join(record.target_modules),
            record.digest[:16],
            f"{status}, pinned" if record.pinned else status,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))  # as text, or rich reads markup in it
    return table


def _as_tree(record: AdapterRecord, state_dir: Path) -> dict[str, Any]:
    tree = asdict(record)
    del tree["source_state"]
    path = state_dir / CACHE_DIRECTORY / record.digest if record.digest and record.status == "ready" else None
    if path and not path.is_dir():  # evicted
        path = None
    merged = merge_record(path) if path and record.source.startswith(MERGE_PREFIX) else None
    return {**tree, "path": str(path) if path else None, "merge": msgspec.to_builtins(merged)}
