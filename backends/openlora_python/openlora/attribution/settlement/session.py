"""What the settle commands work with: the chain of a deployment, its facts, the exports, and progress bars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from ...errors import ContractRefused, InvalidArgument
from ...progress import progress_bars
from ..receipt import decode_leaf
from .books import Books, keep_prefixes, open_books
from .facts import BlockHeader, ChainFacts
from .history import Advance
from .prefix_store import PrefixStore

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount
    from web3 import Web3
    from web3.contract.contract import ContractFunction
    from web3.types import TxReceipt

    from ...network.contracts import Contracts
    from ...network.deployment import Deployment
    from ..export import LogExport

_IN_WORDS = {
    "AccessControlUnauthorizedAccount": "this key does not have the role for it",
    "EpochPending": "a proposal is pending: it is accepted or vetoed first",
    "NoEpochPending": "no proposal is pending",
    "TooEarly": "the proposal is not ripe yet",
    "TooFewSignatures": "more attestations are needed",
    "NotAttestor": "one who attested is not an attestor, or may propose as well",
    "NotProposed": "the attestations are for another proposal than the pending one",
    "InsufficientDeposit": "the log's deposit does not cover it: `openlora settle deposit`",
    "EpochCapExceeded": "it is more than one epoch may pay",
    "NotAnchored": "the chain took back an anchor",
    "WrongStart": "a newer epoch was accepted, which is not in a final block yet: wait for it",
    "WrongTotal": "a newer epoch was accepted, which is not in a final block yet: wait for it",
    "InvalidProof": "a newer epoch was accepted, which is not in a final block yet: wait for it",
    "NothingToClaim": "all of it was claimed already",
    "UnknownLog": "no such log is registered",
    "IsPaused": "the distributor is paused",
    "ERC20InsufficientBalance": "the account has not enough of the token",
}
_NAME = re.compile(r"\b([A-Z]\w+)\(")


def settle_dir(state_dir: Path) -> Path:
    """Where settlement keeps its own state; the server never reads it."""
    directory = state_dir / "settle"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    return directory


def prefix_store(state_dir: Path) -> PrefixStore:
    """What former commands checked."""
    return PrefixStore(settle_dir(state_dir) / "prefixes")


def open_exports(directories: Sequence[Path]) -> list[LogExport]:
    """The exports to read. InvalidArgument, ReceiptInvalid: as `LogExport` says."""
    from ..export import LogExport

    return [LogExport(directory) for directory in directories]


@dataclass
class ChainSession:
    """A deployment's chain, checked, and everything that its final blocks say."""

    deployment: Deployment
    web3: Web3
    contracts: Contracts
    facts: ChainFacts
    found: dict[int, BlockHeader] = field(default_factory=dict)  # headers that receipts named

    @classmethod
    def open(cls, file: Path | None, state_dir: Path) -> ChainSession:
        """InvalidArgument, Unavailable, ChainMismatch: as `Deployment.load` and `connect` say."""
        from ...network.arguments import deployment_file
        from ...network.chain_facts import read_facts
        from ...network.contracts import contracts_of
        from ...network.deployment import Deployment

        deployment = Deployment.load(deployment_file(file))
        web3 = deployment.connect()
        with bars() as bar:
            task = bar.add_task("chain", total=None)
            facts = read_facts(
                web3,
                deployment,
                cache=settle_dir(state_dir) / "facts.sqlite",
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        return cls(deployment, web3, contracts_of(web3, deployment), facts)

    def header(self, number: int) -> BlockHeader:
        """Of a block up to the facts' head: from the facts, or else from the chain."""
        from ...network.chain_facts import header_of

        known = self.facts.headers.get(number) or self.found.get(number)
        if known is None:
            known = header_of(self.web3, self.deployment, number)
            if known is None:
                return self.facts.header(number)  # says what is missing
            self.found[number] = known
        return known

    def account(self, key_file: Path) -> LocalAccount:
        from ...network.signer import load_signer

        return load_signer(key_file, self.deployment.chain_id, self.deployment.rpc_url)

    def send(self, account: LocalAccount, call: ContractFunction) -> TxReceipt:
        """Send and wait. ContractRefused: what the contract said, and what that means."""
        from ...network.transactions import send

        try:
            return send(self.web3, account, call)
        except ContractRefused as error:
            name = _NAME.search(error.message)
            words = _IN_WORDS.get(name[1]) if name else None
            raise ContractRefused(f"{words}: {error.message}" if words else error.message) from error

    def books(self, exports: Sequence[LogExport], store: PrefixStore | None) -> Books:
        """All logs that have an export, judged by this chain."""
        return judged(exports, self.facts, store, self)


@dataclass
class Settling:
    """All that a command needs which computes an epoch and then sends or signs something: with `open_settling`."""

    session: ChainSession
    account: LocalAccount
    logs: list[LogExport]
    store: PrefixStore
    books: Books

    def keep(self, stops: Mapping[bytes, int] | None = None) -> None:
        """Remember what was checked, so that the next command need not check it again."""
        keep_prefixes(self.books, self.logs, self.store, stops)


def open_settling(
    exports: Sequence[Path], key: Path, deployment: Path | None, state_dir: Path, from_scratch: bool
) -> Settling:
    """The books of all exports, judged by a deployment's chain. Raises as `ChainSession.open` and `open_books` do."""
    logs = open_exports(exports)
    session = ChainSession.open(deployment, state_dir)
    account = session.account(key)
    store = prefix_store(state_dir)
    return Settling(session, account, logs, store, session.books(logs, None if from_scratch else store))


def judged(
    exports: Sequence[LogExport], facts: ChainFacts, store: PrefixStore | None, session: ChainSession | None = None
) -> Books:
    """`open_books` with a bar for each log; headers are those of the session if there is one."""
    with bars() as bar:

        def started(what: str, leaves: int) -> Advance:
            task = bar.add_task(what, total=leaves)
            return lambda count: bar.advance(task, count)

        return open_books(exports, facts, session.header if session else None, store, started)


def referenced_blocks(export: LogExport) -> set[int]:
    """The numbers of all blocks that the registry references of a log name."""
    numbers = set()
    references = set()
    for leaf in export.leaves(0, export.size):
        try:
            references.add(decode_leaf(leaf).registry_ref)
        except InvalidArgument:
            continue
    for reference in references:
        preimage = export.blob(reference)
        if preimage is not None and len(preimage) == 128:
            numbers.add(int.from_bytes(preimage[64:96], "big"))
    return numbers


def bars() -> Progress:
    """Bars on standard error where that is a terminal."""
    return progress_bars(MofNCompleteColumn(), TimeRemainingColumn())
