"""What a chain says when it refuses, in our words: one line, with custom errors of contracts decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from json import JSONDecodeError
from typing import Any
from urllib.parse import urlsplit

import requests
from eth_abi import decode as abi_decode
from eth_abi.exceptions import DecodingError
from eth_utils import function_abi_to_4byte_selector, to_checksum_address
from eth_utils.abi import collapse_if_tuple
from web3.exceptions import (
    BlockNotFound,
    ContractCustomError,
    ContractLogicError,
    TimeExhausted,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)

from ..errors import ContractRefused, Unavailable
from .artifacts import load_artifact
from .deployment import CONTRACT_NAMES

RETRY_MS = 2000


@contextmanager
def reaching(rpc_url: str) -> Iterator[None]:
    """Errors of the body in our words.

    Raises:
        ContractRefused: a contract reverted.
        Unavailable: the chain can't be asked, or answers with an error.
    """
    try:
        yield
    except (ContractCustomError, ContractLogicError) as error:
        raise ContractRefused(revert_reason(error)) from error
    except Web3RPCError as error:
        raise Unavailable(f"{place(rpc_url)} answered: {_rpc_message(error)}", retry_after_ms=RETRY_MS) from error
    except TimeExhausted as error:
        raise Unavailable(f"{place(rpc_url)}: {error}", retry_after_ms=RETRY_MS) from error
    except (BlockNotFound, TransactionNotFound) as error:
        raise Unavailable(f"{place(rpc_url)}: {error}", retry_after_ms=RETRY_MS) from error
    except (requests.RequestException, Web3Exception, JSONDecodeError, OSError) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise Unavailable(f"no chain answers at {place(rpc_url)} ({cause:.160})", retry_after_ms=RETRY_MS) from error


def place(rpc_url: str) -> str:
    """Host and port alone: keys of RPC services stand in paths and queries."""
    parts = urlsplit(rpc_url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def revert_reason(error: ContractLogicError) -> str:
    """`SizeNotGrown(previous=3, size=3)`, or the text of a plain revert."""
    data = error.data if isinstance(error.data, str) else None
    return decode_revert(data) or str(error.message or error)


def decode_revert(data: str | None) -> str | None:
    """A custom error of any of our contracts from its data (0x…); None: it is none that we know."""
    if not data or len(data) < 10:
        return None
    known = _errors().get(data[2:10].lower())
    if known is None:
        return f"an unknown error {data[:74]}"
    names = [one["name"] or str(index) for index, one in enumerate(known["inputs"])]
    try:
        types = [collapse_if_tuple(one) for one in known["inputs"]]
        values = abi_decode(types, bytes.fromhex(data[10:]))
    except DecodingError:
        return known["name"]
    shown = ", ".join(f"{name}={_shown(*one)}" for name, *one in zip(names, types, values, strict=True))
    return f"{known['name']}({shown})"


def _shown(kind: str, value: Any) -> str:
    if kind == "address":
        return to_checksum_address(value)
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)


def _rpc_message(error: Web3RPCError) -> str:
    response = error.rpc_response or {}
    inner = response.get("error") if isinstance(response, dict) else None
    message = inner.get("message") if isinstance(inner, dict) else None
    return str(message or error.message)


@cache
def _errors() -> dict[str, dict[str, Any]]:
    """By selector, 8 hex digits: the errors of all contracts, and Solidity's own two."""
    found = {
        "08c379a0": {"name": "Error", "inputs": [{"name": "message", "type": "string"}]},
        "4e487b71": {"name": "Panic", "inputs": [{"name": "code", "type": "uint256"}]},
    }
    for name in CONTRACT_NAMES:
        for entry in load_artifact(name).abi:
            if entry["type"] == "error":
                found[function_abi_to_4byte_selector({**entry, "type": "function"}).hex()] = entry
    return found
