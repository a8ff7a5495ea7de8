"""One transaction: fees stated, signed here, sent, waited for, and what a contract said when it refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eth_account.signers.local import LocalAccount

from ..errors import ContractRefused
from .deployment import is_loopback
from .rpc import reaching

if TYPE_CHECKING:
    from web3 import Web3
    from web3.contract.contract import ContractConstructor, ContractFunction
    from web3.types import TxParams, TxReceipt

WAIT_SECONDS = 180.0
LOCAL_POLL_SECONDS = 0.005
POLL_SECONDS = 1.0
GAS_MARGIN_PERCENT = 20  # what a contract finds may change between the estimate and its block
MIN_TIP = 10**9  # wei; devnets suggest none at all


def send(web3: Web3, account: LocalAccount, call: ContractFunction | ContractConstructor) -> TxReceipt:
    """Send a call and wait until it is in a block. For keys that one process at a time uses: the nonce is the chain's.

    Raises:
        ContractRefused: it reverted, in the estimate (nothing was sent) or in its block.
        Unavailable: the chain does not answer, refuses the transaction, or has it in no block in time.
    """
    url = rpc_url(web3)
    with reaching(url):
        transaction = prepare(web3, account.address, call)
        signed = account.sign_transaction(transaction)
        sent = web3.eth.send_raw_transaction(signed.raw_transaction)
        poll = LOCAL_POLL_SECONDS if is_loopback(url) else POLL_SECONDS
        receipt = web3.eth.wait_for_transaction_receipt(sent, timeout=WAIT_SECONDS, poll_latency=poll)
        if receipt["status"] != 1:
            raise ContractRefused(f"transaction {sent.to_0x_hex()}: {_reason(web3, transaction, receipt)}")
    return receipt


def prepare(web3: Web3, sender: str, call: ContractFunction | ContractConstructor) -> TxParams:
    """The unsigned EIP-1559 transaction: nonce after what is pending, gas as estimated and a fifth, fees as `fees`."""
    tip, cap = fees(web3)
    transaction = call.build_transaction(
        {
            "from": sender,
            "chainId": web3.eth.chain_id,
            "nonce": web3.eth.get_transaction_count(sender, "pending"),
            "maxPriorityFeePerGas": tip,
            "maxFeePerGas": cap,
        }
    )
    transaction["gas"] = transaction["gas"] * (100 + GAS_MARGIN_PERCENT) // 100
    return transaction


def fees(web3: Web3) -> tuple[int, int]:
    """Tip, and the most that is paid: twice the base fee, which five full blocks don't reach, and the tip. In wei."""
    base = web3.eth.get_block("latest")["baseFeePerGas"]
    tip = max(web3.eth.max_priority_fee, MIN_TIP)
    return tip, 2 * base + tip


def rpc_url(web3: Web3) -> str:
    return str(getattr(web3.provider, "endpoint_uri", ""))


def _reason(web3: Web3, transaction: TxParams, receipt: TxReceipt) -> str:
    """Asked again, at the state before its block: what it said there, if it says so again."""
    again: dict[str, Any] = {key: transaction[key] for key in ("from", "to", "data", "value") if key in transaction}
    try:
        with reaching(rpc_url(web3)):
            web3.eth.call(again, receipt["blockNumber"] - 1)
    except ContractRefused as error:
        return error.message
    return f"reverted in block {receipt['blockNumber']}"
