"""A log, a chain and an anchor worker between them, for the tests of anchoring."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from anvil_chain import OWNER, SUBMITTER, Anvil
from attribution_cases import append_completion, append_intent
from eth_account import Account
from eth_account.signers.local import LocalAccount

from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.journal import Journal
from openlora.attribution.keys import load_keys
from openlora.attribution.log import ReceiptLog
from openlora.attribution.log_key import LogKey
from openlora.attribution.merkle_tree import MerkleTree
from openlora.attribution.projection import Projector
from openlora.network.anchor.chain import AnchorChain
from openlora.network.anchor.local_log import LocalLog
from openlora.network.anchor.outbox import Outbox, OutboxRow
from openlora.network.anchor.service import outbox_path
from openlora.network.anchor.worker import AnchorPolicy, AnchorWorker, Report
from openlora.network.contracts import contracts_of
from openlora.network.deployment import Deployment
from openlora.network.transactions import send

START = 1_800_000_000.0  # the workers' clock
EAGER = AnchorPolicy(every_seconds=0.0)
SECONDS = 2.0  # for an answer of the chain, in the tests where it hangs


def serve_requests(state: Path, first: int, count: int) -> None:
    """Journal so many requests, make their receipts and sign a checkpoint of them, as a server does."""
    with Journal.open(state / "journal") as journal, ReceiptLog.open(state) as log:
        numbers = range(first, first + count)
        append_intent(journal, *numbers)
        for number in numbers:
            append_completion(journal, number)
        projector = Projector(state / "journal", log)
        while projector.project():
            pass
        Checkpointer(log).sign_due(now=True)


def register_log(chain: Anvil, deployment: Deployment, state: Path, submitter: str = SUBMITTER.address) -> None:
    """Register a state directory's log, with its receipt key's signature."""
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        key = log.key
    log_contract = contracts_of(chain.web3, deployment).log
    types = {
        "Registration": [
            {"name": "logId", "type": "bytes32"},
            {"name": "owner", "type": "address"},
            {"name": "submitter", "type": "address"},
            {"name": "payee", "type": "address"},
        ]
    }
    domain = {
        "name": "OpenLoRA Log",
        "version": "1",
        "chainId": deployment.chain_id,
        "verifyingContract": log_contract.address,
    }
    message = {"logId": key.log_id, "owner": OWNER.address, "submitter": submitter, "payee": OWNER.address}
    secret = load_keys(state / "keys", create=False).receipt.secret
    signature = Account.sign_typed_data(secret, domain, types, message).signature
    send(chain.web3, OWNER, log_contract.register_log(key, submitter, OWNER.address, bytes(signature)))


class AnchorCase:
    """One state directory and its worker, whose clock stands until `step` says so."""

    def __init__(
        self,
        chain: Anvil,
        deployment: Deployment,
        state: Path,
        account: LocalAccount = SUBMITTER,
        policy: AnchorPolicy = EAGER,
    ) -> None:
        self.chain, self.deployment, self.state, self.account, self.policy = chain, deployment, state, account, policy
        self.now = START
        self.requests = 0
        self.outbox: Outbox | None = None
        self.restart()

    def restart(self) -> None:
        """A new worker over the same files, as after a crash."""
        if self.outbox is not None:
            self.outbox.close()
        self.log = LocalLog(self.state)
        self.outbox = Outbox(outbox_path(self.state))
        self.rpc = AnchorChain(self.deployment, self.key.log_id, SECONDS)
        self.worker = AnchorWorker(self.rpc, self.log, self.outbox, self.account, self.policy)

    @property
    def key(self) -> LogKey:
        return self.log.key

    def serve(self, count: int) -> None:
        serve_requests(self.state, self.requests, count)
        self.requests += count

    def step(self, seconds: float = 1.0) -> Report:
        self.now += seconds
        return self.worker.step(self.now)

    def rows(self) -> list[OutboxRow]:
        """All that was ever signed, oldest first."""
        return self.outbox.newest(self.key.log_id, 10_000)[::-1]

    def head_size(self) -> int:
        return contracts_of(self.chain.web3, self.deployment).log.head_of(self.key.log_id).size

    def check_history(self, size: int) -> None:
        """Each anchor on the chain continues the one before, with the root of these leaves; the last has `size`."""
        check_history(self.chain, self.deployment, self.state, size)


def check_history(chain: Anvil, deployment: Deployment, state: Path, size: int) -> list[int]:
    """As above; the sizes that were anchored."""
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        tree, log_id = MerkleTree(log.leaf_hashes()), log.key.log_id
    contract = contracts_of(chain.web3, deployment).log.contract
    events = contract.events.Anchored.get_logs(from_block=0, argument_filters={"logId": log_id})
    sizes = [event["args"]["size"] for event in events]
    assert [event["args"]["previousSize"] for event in events] == [0, *sizes[:-1]]
    assert [event["args"]["root"] for event in events] == [tree.root(one) for one in sizes]
    assert sizes == sorted(set(sizes)) and sizes[-1:] == [size], f"anchored {sizes}, wanted up to {size}"
    return sizes
