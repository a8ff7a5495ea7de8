"""Merging adapters of the catalog into a new one, as the CLI calls it; `merge_worker` does the work, in its process.

A merge is named by its key: what has been merged before in this state directory is found, not computed again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from safetensors import safe_open

from ..attribution.card import parse_card
from ..errors import Internal, InvalidArgument, Overloaded, Unavailable
from ..processes.worker_process import run_worker
from .adapter_spec import AdapterSpec
from .base_modules import BaseModules, base_modules
from .cache_quota import CacheRoom
from .catalog import Catalog, Change, check_name
from .catalog_file import CATALOG_FILE
from .catalog_reader import CatalogReader
from .catalog_rows import AdapterRecord, BaseFacts
from .ingest_worker import CACHE_DIRECTORY, MODULES_DIRECTORY
from .lora_config import AdapterConfig
from .manifest import WEIGHTS_FILE
from .merge_layout import MergedModule, lay_out
from .merge_plan import RECORD_KEY, MergeLimits, MergePlan, MergeSource, read_record
from .missing_files import MERGE_PREFIX, way_back
from .sources import SourceLimits
from .store import AdapterStore


class MergeRequest(msgspec.Struct, frozen=True):
    """What the worker is asked. `names` are those of the plan's sources, for messages."""

    state_dir: str
    base: BaseFacts
    name: str
    names: tuple[str, ...]
    plan: MergePlan
    card: dict[str, Any] | None
    limits: MergeLimits
    cache: SourceLimits


class ModuleMerged(msgspec.Struct, frozen=True, tag="module"):
    """So many modules are done; `module` is the last of them."""

    done: int
    total: int
    module: str


class MergeResult(msgspec.Struct, frozen=True, tag="merged"):
    """The merged adapter in the catalog. `computed` is False when the same merge was there before."""

    name: str
    version: int
    digest: str
    rank: int
    change: Change
    key: str
    computed: bool


Progress = Callable[[ModuleMerged], None]


@dataclass(frozen=True)
class Prepared:
    """A merge that may begin."""

    layout: tuple[MergedModule, ...]
    modules: BaseModules
    sources: tuple[Path, ...]


def merge(
    state_dir: Path,
    base: BaseFacts,
    name: str,
    sources: Sequence[AdapterSpec],
    method: str = "cat",
    *,
    density: float | None = None,
    majority_sign: str | None = None,
    seed: int | None = None,
    rank: int | None = None,
    card: dict[str, Any] | None = None,
    limits: MergeLimits | None = None,
    cache: SourceLimits | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters of the catalog into version 1, or the next one, of `name`.

    Args:
        sources: with weights; versions as in a request.
        method: one of `merge_plan.METHODS`; the settings after it as in `MergePlan.of`.
        card: terms of the new adapter, as in `openlora.json`.
        limits, cache: of merges, and of what is kept on disk; default: those of no settings.
        progress: is told of every module that is done.

    Raises:
        InvalidArgument: a bad name, method or setting, ranks that don't fit, or no memory for it.
        AdapterNotFound, AdapterInvalid: a source isn't there, is quarantined, or the result's numbers overflow.
        Overloaded: the quota of merged adapters, or that of the cache, is used up.
        Unavailable: a full disk, or the worker was killed.
    """
    check_name(name)
    if any(source.name == name for source in sources):
        raise InvalidArgument(f"{name!r} is one of the sources: the new adapter needs a name of its own", field="name")
    if card is not None:
        card = _terms(card, base)
    with CatalogReader(state_dir / CATALOG_FILE) as reader:
        found = [(source, reader.lookup(source.name, source.version)) for source in sources]
    plan = MergePlan.of(
        [MergeSource(record.digest, source.weight) for source, record in found],
        method,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
        rank=rank,
    )
    request = MergeRequest(
        str(state_dir.resolve()),
        base,
        name,
        tuple(source.name for source in sources),
        plan,
        card,
        limits or MergeLimits(),
        cache or SourceLimits(),
    )
    prepared = prepare(request)
    return prepared if isinstance(prepared, MergeResult) else _computed(request, progress)


def prepare(request: MergeRequest) -> Prepared | MergeResult:
    """Everything short of reading weights: the same merge if it was made before, or its layout within all limits."""
    state_dir, plan = Path(request.state_dir), request.plan
    store = AdapterStore(state_dir / CACHE_DIRECTORY)
    with CatalogReader(state_dir / CATALOG_FILE) as reader:
        records = reader.records()
    merged = [record for record in records if record.source.startswith(MERGE_PREFIX)]
    if again := _same(merged, plan, store):
        return _named(request, again)
    modules = base_modules(Path(request.base.path), request.base.digest, state_dir / MODULES_DIRECTORY)
    named = zip(request.names, plan.sources, strict=True)
    lost = {(name, source.digest) for name, source in named if not store.holds(source.digest)}
    if record := next((record for record in records if (record.name, record.digest) in lost), None):
        raise Unavailable(f"the files of {record.name} are gone from the adapter cache: {way_back(record)}")
    sources = tuple(store.path(source.digest) for source in plan.sources)
    configs = [AdapterConfig.read(path) for path in sources]
    layout = lay_out(plan, request.names, configs, modules, request.base.max_rank, request.limits)
    size = sum(module.bytes for module in layout)
    _check_quota(merged, store, size, request.limits)
    CacheRoom(state_dir / CATALOG_FILE, store, request.cache).check(size)
    return Prepared(layout, modules, sources)


def source_of(plan: MergePlan) -> str:
    """What the catalog says of a merged adapter's origin."""
    return MERGE_PREFIX + plan.key


def merge_record(directory: Path) -> MergePlan | None:
    """What the adapter in `directory` says it was merged from; None = it doesn't say that it was.

    The record is covered by the adapter's digest, but it is a statement of whoever made the file. Where the catalog's
    `source` is `source_of` the record, this node made it; elsewhere, merge the sources again and compare digests.

    Raises:
        InvalidArgument: the record isn't one.
    """
    with safe_open(directory / WEIGHTS_FILE, framework="numpy") as file:
        record = (file.metadata() or {}).get(RECORD_KEY)
    return None if record is None else read_record(record)


def _terms(card: dict[str, Any], base: BaseFacts) -> dict[str, Any]:
    """A card as the catalog keeps it: `base`, which is about bytes, checked and taken out."""
    made_for = parse_card(card).base
    if made_for not in (None, base.digest):
        raise InvalidArgument(f"{made_for[:16]}… is not this base model, {base.digest[:16]}…", field="card.base")
    return {key: value for key, value in card.items() if key != "base"}


def _same(merged: Iterable[AdapterRecord], plan: MergePlan, store: AdapterStore) -> AdapterRecord | None:
    wanted = source_of(plan)
    return next(
        (
            record
            for record in merged
            if record.source == wanted and record.status == "ready" and store.holds(record.digest)
        ),
        None,
    )


def _named(request: MergeRequest, again: AdapterRecord) -> MergeResult:
    """The merge that is there, under the name that is asked for now."""
    with Catalog(Path(request.state_dir) / CATALOG_FILE) as catalog:
        here = catalog.current(request.name, "")
        card = request.card
        if card is None and here is not None and here.digest == again.digest:
            card = here.card
        record, change = catalog.put(replace(again, name=request.name, card=card, origin=""))
    return result(record, change, request.plan, computed=False)


def result(record: AdapterRecord, change: Change, plan: MergePlan, computed: bool) -> MergeResult:
    return MergeResult(record.name, record.version, record.digest, record.rank, change, plan.key, computed)


def _check_quota(merged: Iterable[AdapterRecord], store: AdapterStore, more: int, limits: MergeLimits) -> None:
    digests = {record.digest for record in merged if store.holds(record.digest)}
    if len(digests) >= limits.max_adapters:
        raise Overloaded(
            f"{len(digests)} merged adapters are in the catalog, {limits.max_adapters} are allowed: remove some with "
            "`openlora adapters remove`, or raise merge.max_adapters"
        )
    held = sum((store.path(digest) / WEIGHTS_FILE).stat().st_size for digest in digests)
    if held + more > limits.max_bytes:
        raise Overloaded(
            f"merged adapters take {held >> 20} MiB and this one {more >> 20} MiB, {limits.max_bytes >> 20} MiB are "
            "allowed: remove some with `openlora adapters remove`, or raise merge.max_bytes"
        )


def _computed(request: MergeRequest, progress: Progress | None) -> MergeResult:
    results: list[MergeResult] = []

    def follow(event: ModuleMerged | MergeResult) -> None:
        if isinstance(event, MergeResult):
            results.append(event)
        elif progress is not None:
            progress(event)

    end = run_worker("openlora.adapters.merge_worker", request, ModuleMerged | MergeResult, follow)
    if results:
        return results[0]
    if end.status == -signal.SIGXCPU:
        raise Unavailable(
            f"the merge took more than {request.limits.max_cpu_seconds} s of CPU time and was ended; "
            "merge.max_cpu_seconds allows more"
        )
    if end.status == -signal.SIGKILL:
        raise Unavailable("the merge process was killed, by hand or for want of memory; nothing was changed")
    raise Internal(f"the merge process ended with status {end.status}: {end.complaint}")
