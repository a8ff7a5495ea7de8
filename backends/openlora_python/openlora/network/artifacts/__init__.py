"""The compiled contracts, as contracts/build.mjs writes them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from openlora.errors import InvalidArgument


def load_artifact(name: str) -> dict[str, Any]:
    """A contract's artifact by its name, such as "RewardDistributor".

    Its keys: contract, abi, bytecode and deployed_bytecode (0x…), immutable_references (where the constructor fills in
    deployed_bytecode), compiler (version, settings), sources (path to SHA-256). InvalidArgument: no such contract.
    """
    file = resources.files(__name__) / f"{name}.json"
    if not file.is_file():
        known = sorted(path.name[:-5] for path in resources.files(__name__).iterdir() if path.name.endswith(".json"))
        raise InvalidArgument(f"{name!r} is not one of {', '.join(known)}", field="contract")
    return json.loads(file.read_text(encoding="utf-8"))
