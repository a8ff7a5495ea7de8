"""The chain as the resolver sees it: the view in the catalog, as long as it is this deployment's and young enough."""

from __future__ import annotations

import time

from ..access_rule import ADDRESS
from ..adapters.catalog_reader import CatalogReader
from ..adapters.chain_view import ChainView
from ..attribution.registry_reference import RegistryReference
from ..config import RunConfig
from ..network.deployment import Deployment
from ..network.holdings import CachedHoldings

RETRY_MS = 1000


class ServedChain:
    """What requests go by of the chain that the settings name."""

    def __init__(self, run: RunConfig) -> None:
        """Raises InvalidArgument: the deployment file is none."""
        network = run.settings.network
        deployment = Deployment.load(network.deployment)
        self._place = (deployment.chain_id, deployment.contracts.AdapterRegistry.address)
        self._max_age = network.max_view_age_seconds
        self.holdings = CachedHoldings(run.holdings_path, run.socket("holdings"), network.max_view_age_seconds)

    def view(self, catalog: CatalogReader) -> ChainView | None:
        """The newest view. An old one too: what it says of its block stays true, and settlement has its own limit."""
        view = catalog.chain_view()
        return view if view is not None and (view.chain_id, view.registry) == self._place else None

    def grants(self, view: ChainView | None) -> bool:
        """Whether the chain's adapters may be used by this view: what was revoked since is not known of an old one."""
        return view is not None and view.is_fresh(time.time(), self._max_age)

    def awaits(self, caller: str) -> bool:
        """Whether it is not known yet what a caller holds."""
        return ADDRESS.fullmatch(caller) is not None and self.holdings.awaited(caller)


def served_chain(run: RunConfig) -> ServedChain | None:
    """None: the settings name none."""
    return None if run.settings.network.deployment is None else ServedChain(run)


def registry_preimage(view: ChainView | None) -> bytes:
    """What a receipt's `registryRef` is the hash of; empty where there is nothing to refer to."""
    if view is None:
        return b""
    return RegistryReference(view.chain_id, view.registry, view.number, bytes.fromhex(view.hash)).preimage
