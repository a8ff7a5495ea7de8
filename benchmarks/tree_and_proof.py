"""The tree of a million receipts, from their hashes, and a proof file under it: one case of `receipt_log.py`."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from eth_keys import keys
from receipt_requests import Requests

from openlora.attribution.checkpoint import Checkpoint, sign_checkpoint
from openlora.attribution.journal import STATUS_COMPLETE, CompletionFrame
from openlora.attribution.log_key import LogKey
from openlora.attribution.merkle_tree import Frontier, MerkleTree
from openlora.attribution.proof import ReceiptProof, parse_proof, verify_proof
from openlora.attribution.receipt import ReceiptHasher, leaf_hash, receipt_from_frames, sign_digest
from openlora.attribution.receipt_json import receipt_document


def tree(count: int = 1_000_000, proofs: int = 100) -> dict[str, Any]:
    """A log of `count` receipts, all but the proven one by their leaf hashes only."""
    hashes = [hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(count)]
    request = Requests().intents(1)[0]
    receipt_key, checkpoint = PrivateKey(), Ed25519PrivateKey.generate()
    signer = keys.PublicKey.from_compressed_bytes(receipt_key.public_key.format()).to_checksum_address()
    key = LogKey("example.org/log", signer, checkpoint.public_key().public_bytes_raw(), bytes(32))
    end = CompletionFrame(request.request_id, count // 2, STATUS_COMPLETE, 50, bytes(32), request.started_at)
    unsigned = receipt_from_frames(request, end, key.log_id)
    hashes[end.seq] = leaf_hash(unsigned.leaf)

    def seconds(make: Callable[[], Any]) -> tuple[float, Any]:
        begun = time.perf_counter()
        made = make()
        return time.perf_counter() - begun, made

    frontier_seconds, frontier = seconds(lambda: _frontier_of(hashes))
    tree_seconds, whole = seconds(lambda: MerkleTree(hashes))
    note = sign_checkpoint(Checkpoint(key.origin, count, frontier.root()), checkpoint)
    signature = sign_digest(receipt_key, ReceiptHasher(key.log_id).digest(unsigned.leaf))
    document = receipt_document(unsigned.receipt, signature, key, unsigned.blobs, None)
    file = str(ReceiptProof(document, end.seq, tuple(whole.inclusion_proof(end.seq)), note)).encode()
    taken = [seconds(lambda: verify_proof(parse_proof(file), key))[0] for _ in range(proofs)]
    return {
        "receipts": count,
        "frontier_s": round(frontier_seconds, 2),
        "tree_s": round(tree_seconds, 2),
        "proof_ms": round(1000 * statistics.median(taken), 3),
    }


def _frontier_of(hashes: Sequence[bytes]) -> Frontier:
    frontier = Frontier()
    for one in hashes:
        frontier.append(one)
    return frontier
