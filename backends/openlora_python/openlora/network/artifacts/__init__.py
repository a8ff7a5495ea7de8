"""The compiled contracts, as contracts/build.mjs writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ...errors import InvalidArgument


@dataclass(frozen=True)
class Artifact:
    """One contract. Bytecode is `0x…`; of the deployed one, the constructor fills in the immutable references."""

    contract: str
    abi: list[dict[str, Any]]
    bytecode: str
    deployed_bytecode: str
    immutable_references: list[list[dict[str, int]]]  # per immutable its places: {"start", "length"} in bytes
    compiler: Mapping[str, Any]  # {"version", "settings"}
    sources: Mapping[str, str]  # path from contracts/ (or in node_modules, with an @) to SHA-256


@cache
def load_artifact(contract: str) -> Artifact:
    """The artifact of a contract by its name, such as "RewardDistributor". InvalidArgument: there is none."""
    files = resources.files(__name__)
    known = sorted(file.name.removesuffix(".json") for file in files.iterdir() if file.name.endswith(".json"))
    if contract not in known:
        raise InvalidArgument(f"{contract!r} is not one of {', '.join(known)}", field="contract")
    return Artifact(**json.loads((files / f"{contract}.json").read_text(encoding="utf-8")))
