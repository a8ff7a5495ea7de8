"""What the anchor worker asks of a chain, and the answers to a transaction, whatever node gives them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from eth_account.signers.local import LocalAccount
from web3 import HTTPProvider, Web3
from web3.exceptions import TransactionNotFound, Web3RPCError
from web3.types import TxReceipt

from ..contracts import AttributionLog, LogHead, contracts_of
from ..deployment import RPC_SECONDS, Deployment
from ..rpc import reaching
from ..transactions import GAS_MARGIN_PERCENT
from .fees import Fees

NOBODY = "0x" + "00" * 20
NO_HEAD = LogHead(0, bytes(32), NOBODY)


@dataclass(frozen=True)
class ChainView:
    """The newest block and the newest final one, with a log's head and a key's count of transactions at both."""

    block: int
    base_fee: int  # wei per gas
    head: LogHead
    nonce: int
    final_block: int
    final_head: LogHead
    final_nonce: int


class Answer(StrEnum):
    """What a node says to the bytes of a transaction."""

    ACCEPTED = "accepted"
    KNOWN = "known already"
    NONCE_USED = "nonce used already"
    UNDERPRICED = "pays too little to replace another"
    FEE_TOO_LOW = "pays less than the base fee"
    NO_FUNDS = "the key has too little money for gas"
    REFUSED = "refused"


# Lower case parts of what nodes say (anvil, geth, and others after them), the first that fits.
_ANSWERS = (
    ("already known", Answer.KNOWN),
    ("already imported", Answer.KNOWN),
    ("known transaction", Answer.KNOWN),
    ("alreadyknown", Answer.KNOWN),
    ("nonce too low", Answer.NONCE_USED),
    ("oldnonce", Answer.NONCE_USED),
    ("replacement", Answer.UNDERPRICED),
    ("underpriced", Answer.UNDERPRICED),
    ("less than block base fee", Answer.FEE_TOO_LOW),
    ("feetoolow", Answer.FEE_TOO_LOW),
    ("insufficient funds", Answer.NO_FUNDS),
)


@dataclass(frozen=True)
class Sent:
    """A node's answer, and its words where it gave any."""

    answer: Answer
    words: str = ""

    def __str__(self) -> str:
        return f"{self.answer} ({self.words})" if self.answer is Answer.REFUSED else str(self.answer)


class AnchorChain:
    """The chain of a deployment. All methods raise Unavailable when it does not answer."""

    def __init__(self, deployment: Deployment, log_id: bytes, timeout_seconds: float = RPC_SECONDS) -> None:
        self.deployment = deployment
        self.log_id = log_id
        # web3 would try again by itself, sending too: the worker does, and keeps count
        provider = HTTPProvider(
            deployment.rpc_url, request_kwargs={"timeout": timeout_seconds}, exception_retry_configuration=None
        )
        self.web3 = Web3(provider)
        self.contract: AttributionLog = contracts_of(self.web3, deployment).log

    def look(self, sender: str) -> ChainView:
        """Look at the chain after making sure that it is the right one. ChainMismatch: it is not."""
        self.deployment.check(self.web3)
        with reaching(self.deployment.rpc_url):
            latest = self.web3.eth.get_block("latest")
            block, final = latest["number"], min(self.deployment.final_block(self.web3)["number"], latest["number"])
            return ChainView(
                block=block,
                base_fee=latest.get("baseFeePerGas", 0),
                head=self.contract.head_of(self.log_id, block),
                nonce=self.web3.eth.get_transaction_count(sender, block),
                final_block=final,
                final_head=self._final_head(final),
                final_nonce=self.web3.eth.get_transaction_count(sender, final),
            )

    def suggested_tip(self) -> int:
        """Wei per gas."""
        with reaching(self.deployment.rpc_url):
            return self.web3.eth.max_priority_fee

    def calldata(self, previous_size: int, previous_root: bytes, size: int, root: bytes) -> bytes:
        """That of `anchor` for one batch."""
        call = self.contract.anchor(self.log_id, previous_size, previous_root, size, root)
        return bytes.fromhex(call._encode_transaction_data()[2:])

    def gas(self, sender: str, calldata: bytes) -> int:
        """The limit for a call: its estimate and a fifth. ContractRefused: it would revert now."""
        with reaching(self.deployment.rpc_url):
            estimate = self.web3.eth.estimate_gas({"from": sender, "to": self.contract.address, "data": calldata})
        return estimate * (100 + GAS_MARGIN_PERCENT) // 100

    def sign(self, account: LocalAccount, nonce: int, calldata: bytes, gas: int, fees: Fees) -> tuple[bytes, bytes]:
        """The transaction's bytes and its hash."""
        signed = account.sign_transaction(
            {
                "type": 2,
                "chainId": self.deployment.chain_id,
                "nonce": nonce,
                "to": self.contract.address,
                "value": 0,
                "data": calldata,
                "gas": gas,
                "maxFeePerGas": fees.max_fee,
                "maxPriorityFeePerGas": fees.tip,
            }
        )
        return bytes(signed.raw_transaction), bytes(signed.hash)

    def send(self, raw: bytes) -> Sent:
        """Give a signed transaction to the node. Its own words decide nothing for good: the next look does."""
        with reaching(self.deployment.rpc_url):
            try:
                self.web3.eth.send_raw_transaction(raw)
            except Web3RPCError as error:
                words = " ".join(str(error.message).split())
                known = (answer for part, answer in _ANSWERS if part in words.lower())
                return Sent(next(known, Answer.REFUSED), words)
        return Sent(Answer.ACCEPTED)

    def receipt(self, transaction_hash: bytes) -> TxReceipt | None:
        """That of a transaction in a block; None: it is in none."""
        with reaching(self.deployment.rpc_url):
            try:
                return self.web3.eth.get_transaction_receipt(transaction_hash)
            except TransactionNotFound:
                return None

    def _final_head(self, block: int) -> LogHead:
        """At a block before the contract there is none; nothing was anchored then."""
        if not self.web3.eth.get_code(self.contract.address, block):
            return NO_HEAD
        return self.contract.head_of(self.log_id, block)
