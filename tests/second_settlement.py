"""Settlement a second time, from docs/settlement.md alone: what the product computes has to equal this, bit for bit.

Nothing of the product is imported. It reads the directories that `openlora receipts export` writes and a list of chain
events, and is slow and plain on purpose.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from Crypto.Hash import keccak as _keccak
from eth_keys import keys
from eth_keys.exceptions import BadSignature, ValidationError

ZERO = bytes(32)
BILLION, MILLION = 10**9, 10**6
HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0
RECEIPT_TYPE = (
    b"Receipt(uint16 schema,bytes32 logId,uint64 seq,bytes32 requestId,uint8 status,bytes32 baseModel,"
    b"bytes32 runtimeHash,bytes32 adaptersHash,bytes32 termsHash,bytes32 registryRef,bytes32 promptCommit,"
    b"bytes32 outputCommit,uint32 inTokens,uint32 outTokens,uint64 startedAt,uint64 endedAt,uint128 price,"
    b"bytes32 paymentRef,bytes32 computeProof)"
)
# (name, bits) in the order of the words; 256 bits are bytes32
WORDS = [(item.split()[1], item.split()[0]) for item in RECEIPT_TYPE.decode()[8:-1].split(",")]
HEX64, ADDRESS = re.compile(r"[0-9a-f]{64}"), re.compile(r"0x[0-9a-fA-F]{40}")


@dataclass(frozen=True)
class Event:
    """One event of a final block; `arguments` by the names of docs/settlement.md, bytes as bytes."""

    block: int
    index: int
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """What the chain says: its id, three addresses, events, and (hash, timestamp) by block number."""

    chain_id: int
    registry: str
    distributor: str
    events: list[Event]
    headers: dict[int, tuple[bytes, int]]

    def named(self, name: str, **arguments: Any) -> list[Event]:
        found = [event for event in self.events if event.name == name]
        found = [event for event in found if all(event.arguments[key] == value for key, value in arguments.items())]
        return sorted(found, key=lambda event: (event.block, event.index))


@dataclass
class LogResult:
    """What came out for one log: its good size, and per leaf the reason (None = paid), price and shares."""

    log_id: bytes
    good_size: int
    reasons: list[str | None] = field(default_factory=list)
    prices: list[int] = field(default_factory=list)
    shares: list[dict[bytes, int]] = field(default_factory=list)

    def paid(self, start: int, stop: int) -> int:
        return sum(self.prices[start:stop])


def keccak(data: bytes) -> bytes:
    return _keccak.new(digest_bits=256, data=data).digest()


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def u256(number: int) -> bytes:
    return number.to_bytes(32, "big")


def address_bytes(address: str) -> bytes:
    return bytes.fromhex(address[2:])


def canonical(tree: Any) -> bytes:
    """JCS of a tree without floats."""
    if isinstance(tree, dict):
        pairs = sorted(tree.items(), key=lambda pair: pair[0].encode("utf-16-be"))
        return b"{" + b",".join(canonical(key) + b":" + canonical(value) for key, value in pairs) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(map(canonical, tree)) + b"]"
    if isinstance(tree, str):
        return json.dumps(tree, ensure_ascii=False).encode()
    if type(tree) is int and abs(tree) < 2**53:
        return str(tree).encode()
    raise ValueError(f"not of these blobs: {tree!r}")


# --- the export -------------------------------------------------------------------------------------------------------


class Export:
    """Docs §1. Everything that is not as it says raises."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        line = (directory / "log.pub").read_text()
        facts = dict(part.split("=", 1) for part in line.split()[1:])
        init = [u256(0x0301), ZERO, sha256(b"openlora/origin/v1" + facts["origin"].encode())]
        init += [bytes(12) + address_bytes(facts["signer"])]
        init += [bytes.fromhex(facts[name]) for name in ("checkpoint", "nonce", "predecessor")]
        self.log_id, self.signer = sha256(b"".join(init)), address_bytes(facts["signer"])
        self.size = int((directory / "checkpoint").read_text().split("\n")[1])
        self.leaves: list[bytes] = []
        self.signatures: list[bytes] = []
        for bundle in range(-(-self.size // 256)):
            count = min(256, self.size - 256 * bundle)
            entries, signatures = (self._bundle(kind, bundle, count) for kind in ("tile/entries", "signatures"))
            place = 0
            for number in range(count):
                length = int.from_bytes(entries[place : place + 2], "big")
                self.leaves.append(entries[place + 2 : place + 2 + length])
                place += 2 + length
                self.signatures.append(signatures[65 * number : 65 * number + 65])
            assert place == len(entries) and len(signatures) == 65 * count

    def blob(self, digest: bytes) -> bytes | None:
        path = self.directory / "blobs" / digest.hex()
        content = path.read_bytes() if path.is_file() else None
        return content if content is not None and sha256(content) == digest else None

    def _bundle(self, kind: str, number: int, count: int) -> bytes:
        digits = f"{number:03d}" if number < 1000 else ""
        if not digits:
            groups = []
            while number:
                number, rest = divmod(number, 1000)
                groups.append(f"{rest:03d}")
            digits = "/".join([f"x{group}" for group in reversed(groups[1:])] + [groups[0]])
        path = self.directory / kind / digits
        return path.read_bytes() if count == 256 else Path(f"{path}.p", str(count)).read_bytes()


def tree_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1."""
    if not leaves:
        return sha256(b"")
    level = [sha256(b"\0" + leaf) for leaf in leaves]
    while len(level) > 1:
        level = [
            sha256(b"\1" + level[place] + level[place + 1]) if place + 1 < len(level) else level[place]
            for place in range(0, len(level), 2)
        ]
    return level[0]


# --- the registry at a block ------------------------------------------------------------------------------------------


def in_force(chain: Chain, name: str, block: int, **key: Any) -> dict[str, Any] | None:
    """The newest version that counts at a block: parameters or terms."""
    time = chain.headers[block][1]
    versions = [event.arguments for event in chain.named(name, **key) if event.block <= block]
    versions = [version for version in versions if version["effectiveAt"] <= time]
    return max(versions, key=lambda version: version["version"], default=None)


def model_terms(chain: Chain, owner: str, digest: bytes, block: int) -> tuple[bytes, bytes] | None:
    """(registered base, terms hash) of a model in force at a block."""
    mine = {"digest": digest}

    def of(name: str) -> list[Event]:
        return [
            event
            for event in chain.named(name, **mine)
            if event.block <= block and address_bytes(event.arguments["owner"]) == address_bytes(owner)
        ]

    registered, terms = of("ModelRegistered"), of("TermsPublished")
    terms = [event for event in terms if event.arguments["effectiveAt"] <= chain.headers[block][1]]
    if not registered or not terms or of("ModelRevoked"):
        return None
    newest = max(terms, key=lambda event: event.arguments["version"])
    return registered[0].arguments["base"], newest.arguments["termsHash"]


def read_parameters(document: str) -> dict[str, Any] | None:
    names = {"schema", "platform", "platform_ppm", "node_ppm", "adapter_ppm", "data_ppm", "base_ppm", "max_age"}
    if nesting(document) > 32:
        return None
    try:
        tree = json.loads(document)
        exact = isinstance(tree, dict) and canonical(tree) == document.encode()
    except ValueError:
        return None
    if not exact or tree.keys() != names or tree["schema"] != 1 or type(tree["schema"]) is not int:
        return None
    parts = [tree[name] for name in sorted(names) if name.endswith("_ppm")]
    if any(type(part) is not int or not 0 <= part <= MILLION for part in parts) or sum(parts) != MILLION:
        return None
    if type(tree["max_age"]) is not int or not 1 <= tree["max_age"] < 2**53:
        return None
    platform = tree["platform"]
    if not isinstance(platform, str) or not ADDRESS.fullmatch(platform) or checksummed(platform) != platform:
        return None
    if int(platform, 16) == 0:
        return None
    return tree


def checksummed(address: str) -> str:
    digits = address[2:].lower()
    hashed = keccak(digits.encode()).hex()
    pairs = zip(digits, hashed, strict=False)
    return "0x" + "".join(digit.upper() if int(one, 16) >= 8 else digit for digit, one in pairs)


# --- blobs ------------------------------------------------------------------------------------------------------------


def _is(condition: bool) -> None:
    if not condition:
        raise ValueError("not of the schema")


def _keys(tree: Any, *names: str) -> None:
    _is(isinstance(tree, dict) and tree.keys() == set(names))


def _text(value: Any) -> None:
    _is(isinstance(value, str) and len(value) <= 256)


def _digest(value: Any) -> None:
    _is(isinstance(value, str) and HEX64.fullmatch(value) is not None)


def _address(value: Any) -> None:
    _is(isinstance(value, str) and ADDRESS.fullmatch(value) is not None)


def _integer(value: Any, low: int, high: int) -> None:
    _is(type(value) is int and low <= value <= high)


def read_blob(content: bytes, kind: str) -> Any:
    tag = f"openlora/{kind}/v1".encode()
    _is(content.startswith(tag))
    text = content[len(tag) :].decode()
    _is(nesting(text) <= 32)
    tree = json.loads(text)
    _is(canonical(tree) == content[len(tag) :])
    return tree


def nesting(text: str) -> int:
    """How deep a JSON text goes, told without a parser."""
    brackets = re.sub(r"[^\[\]{}]", "", re.sub(r'"(?:[^"\\]|\\.)*+"', "", text))
    return max(accumulate((1 if one in "[{" else -1 for one in brackets), initial=0))


def check_runtime(tree: Any) -> None:
    _keys(tree, "engine", "version", "dtype", "quantization")
    for value in tree.values():
        _text(value)


def check_adapters(tree: Any) -> None:
    _keys(tree, "adapters", "method")
    _is(isinstance(tree["method"], str) and re.fullmatch("[a-z][a-z_]{0,31}", tree["method"]) is not None)
    _is(isinstance(tree["adapters"], list))
    for adapter in tree["adapters"]:
        _keys(adapter, "digest", "weight")
        _digest(adapter["digest"])
        _integer(adapter["weight"], -(10**7), 10**7)


def check_terms(tree: Any) -> None:
    _keys(tree, "price_version", "parameters", "base", "adapters")
    _integer(tree["price_version"], 1, 2)
    _digest(tree["parameters"])
    _is(isinstance(tree["adapters"], list))
    for model in (tree["base"], *tree["adapters"]):
        _keys(model, "digest", "owner", "input", "output", "datasets")
        _digest(model["digest"])
        _address(model["owner"])
        for price in (model["input"], model["output"]):
            if tree["price_version"] == 1:
                _integer(price, 0, 2**53 - 1)
            else:
                _is(isinstance(price, str) and re.fullmatch("0|[1-9][0-9]*", price) is not None)
                _is(int(price) <= 10**30)
        _is(isinstance(model["datasets"], list))
        for dataset in model["datasets"]:
            _keys(dataset, "id", "digest", "licence", "ppm", "contributors")
            _text(dataset["id"])
            _text(dataset["licence"])
            _digest(dataset["digest"])
            _integer(dataset["ppm"], 0, MILLION)
            _is(isinstance(dataset["contributors"], list))
            for contributor in dataset["contributors"]:
                _keys(contributor, "address", "ppm")
                _address(contributor["address"])
                _integer(contributor["ppm"], 0, MILLION)
            _is(sum(contributor["ppm"] for contributor in dataset["contributors"]) == MILLION)
        if model["datasets"]:
            _is(sum(dataset["ppm"] for dataset in model["datasets"]) == MILLION)


def terms_hash(model: dict[str, Any]) -> bytes:
    prices = {name: str(model[name]) for name in ("input", "output")}
    return sha256(b"openlora/model-terms/v1" + canonical({**model, **prices}))


# --- one receipt ------------------------------------------------------------------------------------------------------


def decode(leaf: bytes) -> dict[str, Any] | None:
    if len(leaf) != 608:
        return None
    values: dict[str, Any] = {}
    for place, (name, kind) in enumerate(WORDS):
        word = leaf[32 * place : 32 * place + 32]
        if kind == "bytes32":
            values[name] = word
        else:
            values[name] = int.from_bytes(word, "big")
            if values[name] >> int(kind.removeprefix("uint")):
                return None
    return values if values["schema"] == 0x0101 and 1 <= values["status"] <= 4 else None


def signed_by(leaf: bytes, signature: bytes, log_id: bytes) -> bytes | None:
    if len(signature) != 65 or signature[64] not in (27, 28) or int.from_bytes(signature[32:64], "big") > HALF_ORDER:
        return None
    parts = [b"EIP712Domain(string name,string version,bytes32 salt)", b"OpenLoRA Receipt", b"1"]
    domain = keccak(b"".join(map(keccak, parts)) + log_id)
    digest = keccak(b"\x19\x01" + domain + keccak(keccak(RECEIPT_TYPE) + leaf))
    try:
        made = keys.Signature(signature[:64] + bytes([signature[64] - 27]))
        return made.recover_public_key_from_msg_hash(digest).to_canonical_address()
    except (BadSignature, ValidationError):
        return None


def settle_log(chain: Chain, export: Export) -> LogResult:
    """Docs §3 and §4 for one log."""
    anchors = chain.named("Anchored", logId=export.log_id)
    good = 0
    for anchor in anchors:
        size = anchor.arguments["size"]
        if size > export.size or tree_root(export.leaves[:size]) != anchor.arguments["root"]:
            break
        good = size
    registered = chain.named("LogRegistered", logId=export.log_id)
    result = LogResult(export.log_id, good)
    seen: set[bytes] = set()
    for index in range(good):
        first = next(anchor for anchor in anchors if anchor.arguments["size"] > index)
        verdict = judge(chain, export, index, first.block, seen)
        if isinstance(verdict, str):
            result.reasons.append(verdict)
            result.prices.append(0)
            result.shares.append({})
        else:
            receipt, terms, adapters, parameters = verdict
            result.reasons.append(None)
            result.prices.append(receipt["price"])
            result.shares.append(shares(terms, adapters, parameters, registered[0].arguments["payee"]))
    return result


def judge(chain: Chain, export: Export, index: int, anchor_block: int, seen: set[bytes]) -> Any:
    """The reason, or what paying needs: (receipt, terms, adapters, parameters)."""
    leaf = export.leaves[index]
    receipt = decode(leaf)
    if receipt is None:
        return "leaf"
    if receipt["logId"] != export.log_id:
        return "log_id"
    repeated = receipt["requestId"] in seen
    seen.add(receipt["requestId"])
    if receipt["seq"] != index:
        return "sequence"
    if repeated:
        return "repeated_request"
    if signed_by(leaf, export.signatures[index], export.log_id) != export.signer:
        return "signature"
    if receipt["status"] in (3, 4):
        return "status"
    if receipt["registryRef"] == ZERO:
        return "unregistered"
    names = ("runtimeHash", "adaptersHash", "termsHash", "registryRef")
    contents = [export.blob(receipt[name]) for name in names]
    if None in contents:
        return "blob_missing"
    try:
        runtime, adapters, terms = (
            read_blob(content, kind) for content, kind in zip(contents, ("runtime", "adapters", "terms"), strict=False)
        )
        check_runtime(runtime)
        check_adapters(adapters)
        check_terms(terms)
        _is(len(contents[3]) == 128 and int.from_bytes(contents[3][32:64], "big") < 2**160)
        used = [adapter["digest"] for adapter in adapters["adapters"]]
        _is(terms["base"]["digest"] == receipt["baseModel"].hex())
        _is([model["digest"] for model in terms["adapters"]] == used)
        _is(len({terms["base"]["digest"], *used}) == len(used) + 1)
    except (ValueError, UnicodeDecodeError):
        return "blob_invalid"
    chain_id, registry, block = (int.from_bytes(contents[3][place : place + 32], "big") for place in (0, 32, 64))
    if chain_id != chain.chain_id or registry != int(chain.registry, 16):
        return "registry_foreign"
    if block not in chain.headers or chain.headers[block][0] != contents[3][96:] or block >= anchor_block:
        return "registry_block"
    found = in_force(chain, "ParametersPublished", block)
    parameters = read_parameters(found["document"]) if found else None
    if parameters is None or found["digest"].hex() != terms["parameters"]:
        return "parameters"
    if chain.headers[anchor_block][1] - chain.headers[block][1] > parameters["max_age"]:
        return "registry_age"
    for model in (terms["base"], *terms["adapters"]):
        known = model_terms(chain, model["owner"], bytes.fromhex(model["digest"]), block)
        base = ZERO if model is terms["base"] else receipt["baseModel"]
        if known != (base, terms_hash(model)):
            return "terms"
    due = 0
    for model in (terms["base"], *terms["adapters"]):
        due += (receipt["inTokens"] * int(model["input"]) + receipt["outTokens"] * int(model["output"])) // MILLION
    return (receipt, terms, adapters, parameters) if due == receipt["price"] else "price"


def shares(terms: Any, adapters: Any, parameters: Any, payee: str) -> dict[bytes, int]:
    """Of 10^9, by account."""
    whole: dict[bytes, Fraction] = {}

    def give(account: str, part: Fraction) -> None:
        whole[address_bytes(account)] = whole.get(address_bytes(account), Fraction(0)) + part

    def give_data(model: Any, part: Fraction) -> None:
        if not model["datasets"]:
            give(model["owner"], part)
        for dataset in model["datasets"]:
            for contributor in dataset["contributors"]:
                give(contributor["address"], part * Fraction(dataset["ppm"] * contributor["ppm"], MILLION**2))

    part = {
        name: Fraction(parameters[f"{name}_ppm"], MILLION) for name in ("platform", "node", "adapter", "data", "base")
    }
    give(parameters["platform"], part["platform"])
    give(payee, part["node"])
    give(terms["base"]["owner"], part["base"])
    weights = [abs(adapter["weight"]) for adapter in adapters["adapters"]]
    if not sum(weights):
        give(terms["base"]["owner"], part["adapter"])
        give_data(terms["base"], part["data"])
    for model, weight in zip(terms["adapters"], weights, strict=True):
        if weight:
            give(model["owner"], part["adapter"] * Fraction(weight, sum(weights)))
            give_data(model, part["data"] * Fraction(weight, sum(weights)))
    found = {account: int(BILLION * fraction) for account, fraction in whole.items()}
    by_remainder = sorted(whole, key=lambda account: (found[account] - BILLION * whole[account], account))
    for account in by_remainder[: BILLION - sum(found.values())]:
        found[account] += 1
    return found


# --- an epoch ---------------------------------------------------------------------------------------------------------


def cumulative_amounts(results: list[LogResult], sizes: dict[bytes, int]) -> dict[bytes, int]:
    """Of every account, in token units, when each log is settled up to its size in `sizes`."""
    ledger: dict[bytes, int] = {}
    for result in results:
        for index in range(sizes.get(result.log_id, 0)):
            for account, share in result.shares[index].items():
                ledger[account] = ledger.get(account, 0) + result.prices[index] * share
    return {account: amount // BILLION for account, amount in ledger.items() if amount // BILLION}


def reward_root(chain: Chain, amounts: dict[bytes, int]) -> bytes:
    """Docs §5."""
    if not amounts:
        return ZERO
    head = u256(chain.chain_id) + bytes(12) + address_bytes(chain.distributor)
    leaves = sorted(keccak(keccak(head + bytes(12) + account + u256(amount))) for account, amount in amounts.items())
    nodes = [b""] * (2 * len(leaves) - 1)
    for place, leaf in enumerate(leaves):
        nodes[len(nodes) - 1 - place] = leaf
    for place in reversed(range(len(leaves) - 1)):
        nodes[place] = keccak(b"".join(sorted(nodes[2 * place + 1 : 2 * place + 3])))
    return nodes[0]


def next_allocations(chain: Chain, results: list[LogResult], cap: int) -> list[tuple[bytes, int, int, int]]:
    """What a proposer chooses: (logId, from, to, amount), ascending; none if nobody would be paid."""
    sizes, rows = settled_sizes(chain), []
    for result in results:
        mine, start = {"logId": result.log_id}, sizes.get(result.log_id, 0)
        covering = [one.block for one in chain.named("Anchored", **mine) if one.arguments["size"] > start]
        if result.good_size > start:
            rows.append((covering[0], result.log_id, start, result))
    paid, free = [], []
    for _, log_id, start, result in sorted(rows, key=lambda row: row[:2]):
        amounts = {
            name: sum(one.arguments["amount"] for one in chain.named(name, logId=log_id))
            for name in ("Deposited", "Settled")
        }
        most = min(amounts["Deposited"] - amounts["Settled"], cap - sum(row[3] for row in paid))
        stop = max(stop for stop in range(start, result.good_size + 1) if result.paid(start, stop) <= most)
        row = (log_id, start, stop, result.paid(start, stop))
        if row[3] and len(paid) < 32:
            paid.append(row)
        elif stop > start and not row[3]:
            free.append(row)
    return sorted(paid + free[: 32 - len(paid)]) if paid else []


def check_settled(chain: Chain, results: list[LogResult]) -> None:
    """Docs §3, History first: raises where the exports are not those that were settled."""
    sizes, by_log = settled_sizes(chain), {result.log_id: result for result in results}
    for log_id, size in sizes.items():
        settled = sum(event.arguments["amount"] for event in chain.named("Settled", logId=log_id))
        result = by_log[log_id]
        if result.good_size < size or result.paid(0, size) != settled:
            raise ValueError(f"{log_id.hex()} is not the export that was settled")
    accepted = [event.arguments["root"] for event in chain.named("Accepted")]
    if reward_root(chain, cumulative_amounts(results, sizes)) != (accepted or [ZERO])[-1]:
        raise ValueError("the accepted root is another one")


def settled_sizes(chain: Chain) -> dict[bytes, int]:
    return {event.arguments["logId"]: event.arguments["to"] for event in chain.named("Settled")}
