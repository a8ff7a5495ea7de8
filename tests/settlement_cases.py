"""A small chain and its logs, made by hand: facts, exports and receipts that are right unless a test says otherwise.

Uses none of the settlement code but the plain classes of facts, so that other implementations can be tested with it.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rfc8785
from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from eth_keys import KeyAPI
from second_settlement import Chain as SecondChain
from second_settlement import Event

from openlora.attribution.log_key import LogKey
from openlora.attribution.receipt import Receipt, ReceiptHasher, encode_leaf, sign_digest
from openlora.attribution.settlement.facts import BlockHeader, ChainEvent, ChainFacts

CHAIN_ID = 31337
REGISTRY = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
ATTRIBUTION_LOG = "0xe7f1725E7734CE288F8367e1Bb143E90bb3F0512"
DISTRIBUTOR = "0x9fE46736679d2D9a65F0992F2272dE9f3c7fa6e0"
START = 1_800_000_000
BLOCK_SECONDS = 10
BUNDLE = 256
WHOLE = 1_000_000
ZERO32 = bytes(32)
BASE = "ba" * 32
FRENCH = "f1" * 32
LEGAL = "1e" * 32


def key_of(name: str) -> PrivateKey:
    """The same key for the same name, always."""
    return PrivateKey(hashlib.sha256(f"settlement test key {name}".encode()).digest())


def address_of(name: str) -> str:
    return KeyAPI().PrivateKey(key_of(name).secret).public_key.to_checksum_address()


PLATFORM, BASE_OWNER, FRENCH_OWNER, LEGAL_OWNER = (address_of(name) for name in ("platform", "base", "french", "legal"))
PARAMETERS = {
    "schema": 1,
    "platform": PLATFORM,
    "platform_ppm": 50_000,
    "node_ppm": 250_000,
    "adapter_ppm": 300_000,
    "data_ppm": 200_000,
    "base_ppm": 200_000,
    "max_age": 3_600,
}


def dataset(name: str, ppm: int, **contributors: int) -> dict[str, Any]:
    """A declared data set; `contributors` are names and their ppm."""
    people = [{"address": address_of(who), "ppm": share} for who, share in contributors.items()]
    return {"id": name, "digest": "da" * 32, "licence": "MIT", "ppm": ppm, "contributors": people}


def model(
    digest: str, owner: str, input: object = "1000000", output: object = "3000000", datasets: Any = ()
) -> dict[str, Any]:
    """A model of a terms blob; prices as price version 2 writes them."""
    prices = {"input": str(input), "output": str(output)}
    return {"digest": digest, "owner": owner, **prices, "datasets": list(datasets)}


def tagged_hash(tag: bytes, document: str | bytes) -> bytes:
    content = document.encode() if isinstance(document, str) else document
    return hashlib.sha256(tag + content).digest()


def canonical(tree: Any) -> str:
    return rfc8785.dumps(tree).decode()


def price_of(terms: dict[str, Any], in_tokens: int, out_tokens: int) -> int:
    models = [terms["base"], *terms["adapters"]]
    return sum((in_tokens * int(one["input"]) + out_tokens * int(one["output"])) // 10**6 for one in models)


def tree_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, by its recursive definition."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + tree_root(leaves[:split]) + tree_root(leaves[split:])).digest()


@dataclass
class Chain:
    """Blocks of ten seconds, and events in them; every event opens a block of its own."""

    number: int = 0
    events: list[ChainEvent] = field(default_factory=list)
    headers: dict[int, BlockHeader] = field(default_factory=dict)
    parameters_digest: bytes = ZERO32
    parameters_version: int = 0
    epoch: int = 0
    registry: str = REGISTRY

    def __post_init__(self) -> None:
        self.mine()

    def mine(self, seconds: int = BLOCK_SECONDS) -> BlockHeader:
        """The next block, so many seconds after the last one."""
        before = self.headers.get(self.number)
        self.number += 1
        timestamp = before.timestamp + seconds if before else START
        header = BlockHeader(self.number, hashlib.sha256(f"block {self.number}".encode()).digest(), timestamp)
        self.headers[self.number] = header
        return header

    @property
    def head(self) -> BlockHeader:
        return self.headers[self.number]

    def emit(self, contract: str, event: str, /, **args: Any) -> BlockHeader:
        header = self.mine()
        self.events.append(ChainEvent(header.number, 0, contract, event, args))
        return header

    def publish_parameters(self, document: dict[str, Any] | str = PARAMETERS, notice: int = 0) -> bytes:
        text = document if isinstance(document, str) else canonical(document)
        self.parameters_version += 1
        self.parameters_digest = tagged_hash(b"openlora/parameters/v1", text)
        self.emit(
            "AdapterRegistry",
            "ParametersPublished",
            version=self.parameters_version,
            digest=self.parameters_digest,
            effectiveAt=self.head.timestamp + BLOCK_SECONDS + notice,
            document=text,
        )
        return self.parameters_digest

    def register(self, terms: dict[str, Any], base: str | None = None) -> None:
        """Register a model and its first terms; `base` None: it is a base model."""
        base_digest = bytes.fromhex(base) if base else ZERO32
        owner, digest = terms["owner"], bytes.fromhex(terms["digest"])
        words = {"owner": owner, "digest": digest}
        self.emit("AdapterRegistry", "ModelRegistered", **words, base=base_digest, name="a model", uri="")
        self.publish_terms(terms, version=1)

    def publish_terms(self, terms: dict[str, Any], version: int, notice: int = 0) -> None:
        text = canonical(terms)
        self.emit(
            "AdapterRegistry",
            "TermsPublished",
            owner=terms["owner"],
            digest=bytes.fromhex(terms["digest"]),
            version=version,
            termsHash=tagged_hash(b"openlora/model-terms/v1", text),
            effectiveAt=self.head.timestamp + BLOCK_SECONDS + notice,
            document=text,
        )

    def revoke(self, terms: dict[str, Any]) -> None:
        digest = bytes.fromhex(terms["digest"])
        self.emit("AdapterRegistry", "ModelRevoked", owner=terms["owner"], digest=digest)

    def deposit(self, log: CaseLog, amount: int) -> None:
        self.emit("RewardDistributor", "Deposited", logId=log.log_id, **{"from": PLATFORM}, amount=amount)

    def propose(self, proposal: Any) -> None:
        """`proposal` has root, total and allocations of (log_id, start, stop, amount)."""
        self.epoch += 1
        names = ("logId", "from", "to", "amount")
        allocations = [dict(zip(names, one.words, strict=True)) for one in proposal.allocations]
        words = {"root": proposal.root, "total": proposal.total, "allocations": allocations}
        self.emit("RewardDistributor", "Proposed", epoch=self.epoch, **words)

    def accept(self, proposal: Any) -> None:
        for log_id, start, stop, amount in (one.words for one in proposal.allocations):
            self.emit("RewardDistributor", "Settled", logId=log_id, **{"from": start}, to=stop, amount=amount)
        words = {"epoch": self.epoch, "root": proposal.root, "total": proposal.total}
        self.emit("RewardDistributor", "Accepted", **words)

    def facts(self) -> ChainFacts:
        places = (CHAIN_ID, REGISTRY, ATTRIBUTION_LOG, DISTRIBUTOR)
        return ChainFacts(*places, self.number, tuple(self.events), dict(self.headers))


class CaseLog:
    """A log with its keys. It is an export of itself (`key`, `size`, `leaves`, `signature`, `blob`), and writes one."""

    def __init__(self, chain: Chain, name: str = "node", register: bool = True) -> None:
        self.chain = chain
        self.name = name
        self.payee = address_of(f"{name} payee")
        self.checkpoint_key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
        self.key = LogKey(
            origin=f"test/{name}",
            signer=address_of(f"{name} signer"),
            checkpoint_key=self.checkpoint_key.public_key().public_bytes_raw(),
            nonce=hashlib.sha256(f"nonce {name}".encode()).digest(),
            predecessor=ZERO32,
        )
        self.log_id = self.key.log_id
        self.rows: list[bytes] = []
        self.signatures: list[bytes | None] = []
        self.blobs: dict[bytes, bytes] = {}
        self.anchored = 0
        if register:
            owner = address_of(f"{name} owner")
            words = {"owner": owner, "submitter": owner, "payee": self.payee}
            chain.emit("AttributionLog", "LogRegistered", logId=self.log_id, **words)

    def serve(
        self,
        base: dict[str, Any],
        *adapters: tuple[dict[str, Any], int],
        block: BlockHeader | None = None,
        changes: dict[str, Any] | None = None,
        terms: dict[str, Any] | None = None,
        signer: str | None = None,
        leaf: bytes | None = None,
        preimage: bytes | None = None,
    ) -> int:
        """Append a receipt of `base` with adapters and their weights, by the state of `block` (by default the newest).

        `changes` are fields of the receipt, `terms` keys of the terms blob, `leaf` stands instead of the receipt's.
        Returns its number.
        """
        header = block or self.chain.head
        seq = len(self.rows)
        uses = [{"digest": one["digest"], "weight": weight} for one, weight in adapters]
        terms_blob = {
            "price_version": 2,
            "parameters": self.chain.parameters_digest.hex(),
            "base": base,
            "adapters": [one for one, _ in adapters],
        } | (terms or {})
        runtime = {"engine": "torch", "version": "1", "dtype": "float32", "quantization": "none"}
        if preimage is None:
            preimage = reference(CHAIN_ID, self.chain.registry, header)
        fields: dict[str, Any] = {
            "log_id": self.log_id,
            "seq": seq,
            "request_id": hashlib.sha256(f"{self.name} request {seq}".encode()).digest(),
            "status": 1,
            "base_model": bytes.fromhex(base["digest"]),
            "runtime_hash": self.keep(b"openlora/runtime/v1" + rfc8785.dumps(runtime)),
            "adapters_hash": self.keep(b"openlora/adapters/v1" + rfc8785.dumps({"adapters": uses, "method": "cat"})),
            "terms_hash": self.keep(b"openlora/terms/v1" + rfc8785.dumps(terms_blob)),
            "registry_ref": self.keep(preimage),
            "prompt_commit": ZERO32,
            "output_commit": ZERO32,
            "in_tokens": 10,
            "out_tokens": 20,
            "started_at": header.timestamp,
            "ended_at": header.timestamp + 1,
            "payment_ref": ZERO32,
            "compute_proof": ZERO32,
        } | (changes or {})
        fields.setdefault("price", price_of(terms_blob, fields["in_tokens"], fields["out_tokens"]))
        row = leaf if leaf is not None else encode_leaf(Receipt(**fields))
        digest = ReceiptHasher(self.log_id).digest(row)
        self.rows.append(row)
        self.signatures.append(sign_digest(key_of(signer or f"{self.name} signer"), digest))
        return seq

    def keep(self, content: bytes) -> bytes:
        """Put a blob among the others; its SHA-256."""
        digest = hashlib.sha256(content).digest()
        self.blobs[digest] = content
        return digest

    def anchor(self, size: int | None = None, root: bytes | None = None) -> None:
        """Anchor the first `size` receipts, by default all, with their root or another one."""
        size = len(self.rows) if size is None else size
        words = {"size": size, "root": root or tree_root(self.rows[:size]), "previousSize": self.anchored}
        self.chain.emit("AttributionLog", "Anchored", logId=self.log_id, **words)
        self.anchored = size

    @property
    def size(self) -> int:
        return len(self.rows)

    def leaves(self, start: int, stop: int) -> list[bytes]:
        return self.rows[start:stop]

    def signature(self, index: int) -> bytes | None:
        return self.signatures[index]

    def blob(self, sha256: bytes) -> bytes | None:
        return self.blobs.get(sha256)

    def write(self, directory: Path) -> Path:
        """The export as a directory (docs/settlement.md, 1)."""
        directory.mkdir(parents=True)
        (directory / "log.pub").write_text(self.key.line + "\n")
        (directory / "checkpoint").write_text(self._checkpoint())
        for start in range(0, self.size, BUNDLE):
            rows = self.rows[start : start + BUNDLE]
            name = _bundle_name(start // BUNDLE, len(rows))
            entries = b"".join(len(row).to_bytes(2, "big") + row for row in rows)
            _write(directory / "tile" / "entries" / name, entries)
            signatures = [one or bytes(65) for one in self.signatures[start : start + BUNDLE]]
            _write(directory / "signatures" / name, b"".join(signatures))
        (directory / "blobs").mkdir()
        for digest, content in self.blobs.items():
            (directory / "blobs" / digest.hex()).write_bytes(content)
        return directory

    def _checkpoint(self) -> str:
        text = f"{self.key.origin}\n{self.size}\n{base64.b64encode(tree_root(self.rows)).decode()}\n"
        public = self.key.checkpoint_key
        key_id = hashlib.sha256(self.key.origin.encode() + b"\n\x01" + public).digest()[:4]
        signature = base64.b64encode(key_id + self.checkpoint_key.sign(text.encode())).decode()
        return f"{text}\n— {self.key.origin} {signature}\n"


def reference(chain_id: int, registry: str, header: BlockHeader) -> bytes:
    """The preimage of a registryRef."""
    words = (chain_id, int(registry, 16), header.number)
    return b"".join(word.to_bytes(32, "big") for word in words) + header.hash


def second_view(facts: ChainFacts) -> SecondChain:
    """The facts as the second implementation takes them."""
    events = [Event(one.block, one.index, one.name, dict(one.args)) for one in facts.events]
    headers = {number: (header.hash, header.timestamp) for number, header in facts.headers.items()}
    return SecondChain(facts.chain_id, facts.registry, facts.distributor, events, headers)


def _bundle_name(number: int, width: int) -> str:
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.insert(0, f"x{number % 1000:03d}")
    return "/".join(groups) + ("" if width == BUNDLE else f".p/{width}")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@dataclass
class Market:
    """A chain with parameters, a base model and two adapters in force, and one log with a deposit."""

    chain: Chain = field(default_factory=Chain)
    base: dict[str, Any] = field(default_factory=lambda: model(BASE, BASE_OWNER))
    french: dict[str, Any] = field(
        default_factory=lambda: model(
            FRENCH,
            FRENCH_OWNER,
            "500000",
            "700000",
            [dataset("news", 600_000, alice=250_000, bob=750_000), dataset("books", 400_000, alice=WHOLE)],
        )
    )
    legal: dict[str, Any] = field(default_factory=lambda: model(LEGAL, LEGAL_OWNER, "200000", "900000"))
    log: CaseLog = field(init=False)

    def __post_init__(self) -> None:
        self.chain.publish_parameters()
        self.chain.register(self.base)
        self.chain.register(self.french, BASE)
        self.chain.register(self.legal, BASE)
        self.log = CaseLog(self.chain)
        self.chain.deposit(self.log, 10**40)

    def serve(self, **options: Any) -> int:
        """A receipt with both adapters, at weights of 0.7 and −0.3."""
        return self.log.serve(self.base, (self.french, 700_000), (self.legal, -300_000), **options)


def anchored_market() -> Market:
    """One with six receipts, all of them anchored."""
    made = Market()
    for _ in range(6):
        made.serve()
    made.log.anchor()
    return made
