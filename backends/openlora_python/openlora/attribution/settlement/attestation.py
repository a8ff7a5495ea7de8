"""Attestations: an EIP-712 signature over an epoch by somebody who computed it again. docs/settlement.md, 5."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eth_hash.auto import keccak

from ...errors import InvalidArgument
from ...strict_json import parse_strict
from .chain_state import Allocation, Proposal

if TYPE_CHECKING:  # slow to import, and every command imports this file
    from eth_account.messages import SignableMessage
    from eth_account.signers.local import LocalAccount

ATTESTATION_SCHEMA = 1
_TYPES = {
    "Attestation": [
        {"name": "epoch", "type": "uint256"},
        {"name": "root", "type": "bytes32"},
        {"name": "total", "type": "uint256"},
        {"name": "allocations", "type": "Allocation[]"},
    ],
    "Allocation": [
        {"name": "logId", "type": "bytes32"},
        {"name": "from", "type": "uint64"},
        {"name": "to", "type": "uint64"},
        {"name": "amount", "type": "uint256"},
    ],
}


@dataclass(frozen=True)
class Attestation:
    """One signature (r ‖ s ‖ v) over a proposal for one distributor; the signer is what it recovers to."""

    chain_id: int
    distributor: str
    proposal: Proposal
    signature: bytes

    @property
    def signer(self) -> str:
        """A checksummed address. InvalidArgument: it is no signature."""
        from eth_account import Account

        try:
            message = _message(self.chain_id, self.distributor, self.proposal)
            return Account.recover_message(message, signature=self.signature)
        except Exception as error:  # eth_keys and eth_account have no common ancestor of theirs
            raise InvalidArgument(f"the signature fits no key: {error}", field="signature") from error

    def to_json(self) -> str:
        """One JSON object and a newline; amounts are decimal strings."""
        tree = {
            "schema": ATTESTATION_SCHEMA,
            "chain_id": self.chain_id,
            "distributor": self.distributor,
            **proposal_document(self.proposal),
            "signer": self.signer,
            "signature": "0x" + self.signature.hex(),
        }
        return json.dumps(tree, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Attestation:
        """InvalidArgument: not such an object, or its signer is not who signed it."""
        try:
            tree = parse_strict(text)
            if tree["schema"] != ATTESTATION_SCHEMA:
                raise ValueError(f"schema {tree['schema']!r} is not {ATTESTATION_SCHEMA}")
            proposal = Proposal(int(tree["epoch"]), _bytes(tree["root"]), int(tree["total"]), _allocations(tree))
            signature = _bytes(tree["signature"])
            attestation = cls(int(tree["chain_id"]), str(tree["distributor"]), proposal, signature)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"not an attestation: {error}", field="attestation") from error
        if attestation.signer != tree.get("signer"):
            raise InvalidArgument(f"signed by {attestation.signer}, not {tree.get('signer')}", field="attestation")
        return attestation


def attest(account: LocalAccount, chain_id: int, distributor: str, proposal: Proposal) -> Attestation:
    """Sign a proposal. Call `check_proposal` first: the signature says that it is right."""
    signed = account.sign_message(_message(chain_id, distributor, proposal))
    return Attestation(chain_id, distributor, proposal, bytes(signed.signature))


def attestation_digest(chain_id: int, distributor: str, proposal: Proposal) -> bytes:
    """The EIP-712 digest, 32 bytes: what is signed, and what the contract keeps of a proposal."""
    message = _message(chain_id, distributor, proposal)
    return keccak(b"\x19" + message.version + message.header + message.body)


def ascending(attestations: Iterable[Attestation]) -> list[Attestation]:
    """Each signer once, in the order that the contract wants."""
    by_signer = {int(one.signer, 16): one for one in attestations}
    return [by_signer[signer] for signer in sorted(by_signer)]


def proposal_document(proposal: Proposal) -> dict[str, Any]:
    """A proposal as JSON: bytes as 0x hex, amounts as decimal strings."""
    return {
        "epoch": proposal.epoch,
        "root": "0x" + proposal.root.hex(),
        "total": str(proposal.total),
        "allocations": [
            {"log_id": "0x" + one.log_id.hex(), "from": one.start, "to": one.stop, "amount": str(one.amount)}
            for one in proposal.allocations
        ],
    }


def _message(chain_id: int, distributor: str, proposal: Proposal) -> SignableMessage:
    from eth_account.messages import encode_typed_data

    domain = {"name": "OpenLoRA Rewards", "version": "1", "chainId": chain_id, "verifyingContract": distributor}
    allocations = [
        {"logId": one.log_id, "from": one.start, "to": one.stop, "amount": one.amount} for one in proposal.allocations
    ]
    message = {"epoch": proposal.epoch, "root": proposal.root, "total": proposal.total, "allocations": allocations}
    return encode_typed_data(domain, _TYPES, message)


def _allocations(tree: dict[str, Any]) -> tuple[Allocation, ...]:
    return tuple(
        Allocation(_bytes(one["log_id"]), int(one["from"]), int(one["to"]), int(one["amount"]))
        for one in tree["allocations"]
    )


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))
