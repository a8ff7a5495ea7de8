"""From the chain into the catalog: adapters of the owners that are followed, terms, revocations, and what callers hold.

One process per state directory writes it. Serving never waits for it: requests go by the last view that was written,
and access by it ends when it is too old.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..adapters.catalog import Catalog, check_name
from ..adapters.catalog_file import CATALOG_FILE
from ..adapters.catalog_rows import BaseFacts
from ..adapters.chain_view import CHAIN_ORIGIN, ChainTerms, ChainView
from ..adapters.ingest import ingest
from ..adapters.ingest_jobs import job_of
from ..adapters.ingest_worker import IngestJob, IngestResult
from ..adapters.printable import printable
from ..adapters.sources import SourceLimits, parse_uri
from ..config import NetworkSettings
from ..errors import InvalidArgument
from ..processes.lock_file import locked
from .chain_card import chain_card
from .chain_facts import read_facts
from .deployment import Deployment, is_loopback
from .registry_state import ModelInForce, RegistryView, registry_view

if TYPE_CHECKING:
    from web3 import Web3

POLL_SECONDS = 1.0
FIRST_RETRY_SECONDS = 5.0  # of an adapter that could not be brought in; doubled each time …
LONGEST_RETRY_SECONDS = 3600.0  # … up to this
ZERO32 = bytes(32)

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Announced:
    """An adapter of a followed owner that is in force for the base model that is served."""

    name: str  # in the catalog
    digest: str
    uri: str
    card: dict


@dataclass
class Synced:
    """What one pass found. `refused`: what can't be served, and why."""

    view: ChainView
    announced: list[Announced]
    refused: dict[str, str]
    added: list[IngestResult] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


class CatalogSync:
    """Passes over the chain, one after the other, by one process."""

    def __init__(
        self,
        state_dir: Path,
        settings: NetworkSettings,
        deployment: Deployment,
        web3: Web3,
        limits: SourceLimits | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._limits = limits
        self._allowed = frozenset(settings.allowed_owners)
        self._deployment = deployment
        self._web3 = web3
        self._catalog = Catalog(state_dir / CATALOG_FILE)
        self._retries: dict[tuple[str, str], tuple[float, float]] = {}  # when, and how long to wait after that
        self._refused: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(1)
        self._fetching: Future[list[IngestResult]] | None = None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._catalog.__exit__()

    def once(self, progress: Progress = lambda _: None) -> Synced:
        """One pass, and the adapters that it found brought in."""
        synced = self.follow()
        if self._fetching is not None:
            progress("bringing adapters in")
            self._fetching.result()
            removed, synced = synced.removed, self.follow(bring_in=False)
            synced.removed = removed + synced.removed
        return synced

    def follow(self, bring_in: bool = True) -> Synced:
        """One pass; with `bring_in` new adapters are on their way when it returns, and answer after a later one.

        Raises:
            Unavailable: the chain does not answer; the view stays as it was.
            ChainMismatch: another one answers by now.
            InvalidArgument: no server has run with this state directory.
        """
        base = self._catalog.base()
        if base is None:
            raise InvalidArgument(
                f"no server has run with {self._state_dir}: its base model is not known", field="state_dir"
            )
        read_at = time.time()  # before: what is read may be that old
        self._deployment.check_chain(self._web3)
        cache = self._state_dir / "network" / "facts.sqlite"
        facts = read_facts(self._web3, self._deployment, cache=cache)
        registry = registry_view(facts.events, facts.headers[facts.head])
        announced, refused = self._announced(registry, base)
        view = self._view(registry, base, read_at, refused)
        added = self._brought_in()
        gone = self._catalog.follow_chain(view, [ChainTerms(one.name, one.digest, one.card) for one in announced])
        if bring_in:
            self._bring_in(announced, base)
        return Synced(view, announced, {**refused, **self._refused}, added, [record.name for record in gone])

    def _announced(self, registry: RegistryView, base: BaseFacts) -> tuple[list[Announced], dict[str, str]]:
        announced: list[Announced] = []
        refused: dict[str, str] = {}
        for model in registry.models:
            if model.owner not in self._allowed or model.base.hex() != base.digest:
                continue
            name = f"{model.owner}/{model.name}"
            try:
                check_name(name, CHAIN_ORIGIN)
                card = chain_card(model)
                self._check_uri(model.uri)
                announced.append(Announced(name, model.digest.hex(), model.uri, card))
            except InvalidArgument as error:
                refused[printable(f"{name} ({model.digest.hex()[:16]}…)")] = printable(str(error))
        return announced, refused

    def _check_uri(self, uri: str) -> None:
        """Raises InvalidArgument for http://, by which an owner could have this node ask servers beside it for things;
        on a devnet of this machine, adapters may be on it, too."""
        if not uri.lower().startswith("http://"):
            return
        if not (self._deployment.is_local_devnet and is_loopback(parse_uri(uri).public)):
            raise InvalidArgument(f"{uri:.200}: a chain may name https://, s3://, gs:// and hf:// only")

    def _view(self, registry: RegistryView, base: BaseFacts, read_at: float, refused: dict[str, str]) -> ChainView:
        parameters, block = registry.parameters, registry.block
        return ChainView(
            self._deployment.chain_id,
            self._deployment.contracts.AdapterRegistry.address,
            block.number,
            block.hash.hex(),
            None if parameters is None else parameters.digest.hex(),
            self._base_card(registry.models, base, refused),
            read_at,
        )

    def _base_card(self, models: Sequence[ModelInForce], base: BaseFacts, refused: dict[str, str]) -> dict | None:
        """Of the first followed owner who registered the base model itself."""
        for model in models:
            if model.owner in self._allowed and model.base == ZERO32 and model.digest.hex() == base.digest:
                try:
                    return chain_card(model)
                except InvalidArgument as error:
                    refused[f"base model by {model.owner}"] = printable(str(error))
        return None

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _bring_in(self, announced: Sequence[Announced], base: BaseFacts) -> None:
        """Start on what is not in the catalog, in the background: a slow source must not let the view grow old."""
        if self._fetching is not None:
            return
        jobs: list[IngestJob] = []
        wanted = {f"{one.name} ({one.digest[:16]}…)" for one in announced}
        self._refused = {name: why for name, why in self._refused.items() if name in wanted}
        for one in announced:
            due, _ = self._retries.get((one.name, one.digest), (0.0, 0.0))
            if time.monotonic() < due or self._catalog.has(one.name, one.digest):
                continue
            try:
                job = job_of(one.uri, one.name, one.digest, lazy=True)
            except InvalidArgument as error:
                self._put_off(one.name, one.digest, str(error))
                continue
            jobs.append(IngestJob(job.name, job.source, CHAIN_ORIGIN, job.digest, lazy=True))
        if jobs:
            self._fetching = self._pool.submit(self._ingest, base, jobs)

    def _ingest(self, base: BaseFacts, jobs: list[IngestJob]) -> list[IngestResult]:
        # One at a time and in the order of their registration: two versions of one name are two jobs of one name.
        results = []
        for job in jobs:
            (result,) = ingest(self._state_dir, base, [job], limits=self._limits)
            results.append(msgspec.structs.replace(result, digest=job.digest))
        return results

    def _brought_in(self) -> list[IngestResult]:
        """What the background has finished since."""
        if self._fetching is None or not self._fetching.done():
            return []
        fetched, self._fetching = self._fetching, None
        results = fetched.result()
        for result in results:
            if result.status == "ready":
                log.info("adapter %s is here (%s…)", result.name, result.digest[:16])
            else:
                self._put_off(result.name, result.digest, result.reason)
        return results

    def _put_off(self, name: str, digest: str, reason: str) -> None:
        _, waited = self._retries.get((name, digest), (0.0, 0.0))
        wait = min(max(2 * waited, FIRST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
        self._retries[name, digest] = (time.monotonic() + wait, wait)
        self._refused[f"{name} ({digest[:16]}…)"] = printable(reason)
        log.warning("adapter %s (%s…) can't be brought in: %s", printable(name), digest[:16], printable(reason))


def only_sync(state_dir: Path) -> AbstractContextManager[None]:
    """Raises Unavailable when another process follows the chain for this state directory."""
    file = state_dir / "network" / "sync.lock"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return locked(file, lambda pid: f"process {pid} follows the chain for {state_dir} already: a running server does")
