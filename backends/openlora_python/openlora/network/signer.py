"""Keys that send transactions: files of 64 hex digits and a newline, mode 0600, named per command by `--key FILE`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from eth_account import Account
from eth_account.hdaccount import key_from_seed, seed_from_mnemonic
from eth_account.signers.local import LocalAccount

from ..attribution.frames import sync_directory
from ..attribution.keys import load_key
from ..errors import InvalidArgument
from .deployment import DEVNET_CHAIN_ID, is_loopback

DEVNET_MNEMONIC = "test test test test test test test test test test test junk"  # anvil's own: everybody has its keys
PUBLIC_KEYS = 20  # derived from it: more than anvil gives money to unless told otherwise


def load_signer(path: Path, chain_id: int, rpc_url: str) -> LocalAccount:
    """The account of a key file, for one chain.

    Raises:
        Internal: the file can't be read, has another form, or others can read it.
        InvalidArgument: it is a public key of anvil's, and the chain is not a devnet of this machine.
    """
    account: LocalAccount = Account.from_key(load_key(path))
    if account.address in _public_accounts() and not (chain_id == DEVNET_CHAIN_ID and is_loopback(rpc_url)):
        raise InvalidArgument(
            f"{path} is one of anvil's keys, which everybody has; they are taken on chain {DEVNET_CHAIN_ID} of this "
            f"machine only, not on chain {chain_id}",
            field="key",
        )
    return account


def devnet_account(index: int) -> LocalAccount:
    """Account `index` of anvil's mnemonic."""
    return Account.from_key(key_from_seed(_seed(), f"m/44'/60'/0'/0/{index}"))


def write_key(path: Path, account: LocalAccount) -> None:
    """Write an account's key as a file of mode 0600 in a directory of mode 0700."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, bytes(account.key).hex().encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.rename(path)
    sync_directory(path.parent)


@cache
def _seed() -> bytes:
    return seed_from_mnemonic(DEVNET_MNEMONIC, "")


@cache
def _public_accounts() -> frozenset[str]:
    return frozenset(devnet_account(index).address for index in range(PUBLIC_KEYS))
