"""`python -m openlora.network.follow`: the launcher's child that follows the chain for a running server.

It ends with the launcher, and when something is wrong that a new start may mend: another chain under the same address,
a deployment file that was replaced. A chain that does not answer is waited for.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from ..access_rule import AccessRule, TokenTerms
from ..adapters.catalog import Catalog
from ..config import RunConfig
from ..errors import ContractRefused, OpenLoRAError, Unavailable
from ..processes.parent_watch import exit_with
from .deployment import Deployment
from .holdings import HoldingsStore, WishList
from .rpc import reaching
from .sync import POLL_SECONDS, CatalogSync, only_sync

if TYPE_CHECKING:
    from web3 import Web3

CALLS_A_PASS = 200  # so that the view is kept while many addresses wait
BALANCE_OF = bytes.fromhex("70a08231")  # balanceOf(address), the same for ERC-20 and ERC-721
NICENESS = 5

log = logging.getLogger(__name__)


class HoldingsKeeper:
    """Reads the balances that servers wish for, at the block of the view."""

    def __init__(self, run: RunConfig, deployment: Deployment, web3: Web3, wishes: WishList) -> None:
        self._run = run
        self._deployment = deployment
        self._web3 = web3
        self._wishes = wishes
        self._store = HoldingsStore(run.holdings_path)
        self._forget_at = 0.0

    def read(self, block: int) -> None:
        """Raises Unavailable: the chain does not answer; who waits goes on waiting."""
        max_age = self._run.settings.network.max_view_age_seconds
        now = time.time()
        if now > self._forget_at:
            self._store.forget_older(now - 2 * max_age)
            self._forget_at = now + max_age
        if not self._wishes.pending(1):
            return
        tokens = self._gating()
        for address in self._wishes.pending(max(CALLS_A_PASS // max(len(tokens), 1), 1)):
            read_at = time.time()
            balances = {token: held for token in tokens if (held := self._balance(token, address, block)) is not None}
            self._store.put(address, self._deployment.chain_id, balances, read_at)
            self._wishes.done(address)

    def _gating(self) -> list[str]:
        """Contracts on this chain that any adapter asks for, by its card or by the operator."""
        rules = [one.access for one in self._run.settings.access.adapters.values() if one.access is not None]
        with Catalog(self._run.catalog_path) as catalog:
            for card in catalog.cards("token-gated"):
                try:
                    rules.append(AccessRule.model_validate(card.get("access")))
                except ValueError:
                    continue  # it grants nothing either
        tokens: list[TokenTerms] = [rule.token for rule in rules if rule.token is not None]
        return sorted({token.contract for token in tokens if token.chain_id == self._deployment.chain_id})

    def _balance(self, token: str, address: str, block: int) -> int | None:
        """None: there is no such token, so nobody holds any."""
        data = BALANCE_OF + bytes(12) + bytes.fromhex(address[2:])
        try:
            with reaching(self._deployment.rpc_url):
                answer = bytes(self._web3.eth.call({"to": token, "data": data}, block))
        except ContractRefused as error:
            log.warning("%s says of its balances: %s", token, error.message)
            return None
        return int.from_bytes(answer, "big") if len(answer) == 32 else None


def follow(run: RunConfig) -> None:
    """Until the process ends.

    Raises:
        ChainMismatch: the chain is another one than the deployment file's.
        InvalidArgument: the deployment file is none any more.
        Unavailable: another process follows the chain for this state directory.
    """
    settings = run.settings.network
    deployment = Deployment.load(settings.deployment)
    with only_sync(run.state_dir):
        wishes = WishList(run.socket("holdings"))
        web3 = _connected(deployment, wishes)
        sync = CatalogSync(run.state_dir, settings, deployment, web3, run.settings.sources)
        keeper = HoldingsKeeper(run, deployment, web3, wishes)
        told = ""
        while True:
            try:
                synced = sync.follow()
                keeper.read(synced.view.number)
                told = ""
            except Unavailable as error:
                if error.message != told:
                    log.warning("%s", error)
                told = error.message
            wishes.wait(POLL_SECONDS)


def _connected(deployment: Deployment, wishes: WishList) -> Web3:
    while True:
        try:
            return deployment.connect()
        except Unavailable as error:
            log.warning("%s", error)
            wishes.wait(POLL_SECONDS)


def main() -> None:
    run = RunConfig.load()
    exit_with(run.launcher_pid)
    os.nice(NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        follow(run)
    except OpenLoRAError as error:
        log.error("%s", error)
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
