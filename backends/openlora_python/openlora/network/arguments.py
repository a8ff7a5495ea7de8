"""What the commands of a chain have in common: options, and values as people type them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from eth_utils import is_checksum_address, to_checksum_address

from ..access_rule import ADDRESS
from ..errors import InvalidArgument

DEVNET_DEPLOYMENT = Path("var/devnet/deployment.json")

DeploymentFile = Annotated[
    Path | None,
    typer.Option("--deployment", metavar="FILE", envvar="OPENLORA_NETWORK__DEPLOYMENT", help="The deployment file."),
]
Key = Annotated[Path, typer.Option("--key", metavar="FILE", help="Whose account sends: 64 hex digits, mode 0600.")]
StateDir = Annotated[Path, typer.Option("--state-dir", help="The server's state directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]


def deployment_file(given: Path | None) -> Path:
    """`given`, or else that of a devnet in this directory. InvalidArgument: there is none either."""
    if given is None and not DEVNET_DEPLOYMENT.is_file():
        raise InvalidArgument(
            "no deployment file: give --deployment FILE, or OPENLORA_NETWORK__DEPLOYMENT in the environment",
            field="deployment",
        )
    return given or DEVNET_DEPLOYMENT


def parse_address(text: str, field: str) -> str:
    """Checksummed. Lower or upper case alone is taken as it is; InvalidArgument: no address, or a typing error."""
    if not ADDRESS.fullmatch(text):
        raise InvalidArgument(f"{text!r:.80} is not an address", field=field)
    if text[2:] not in (text[2:].lower(), text[2:].upper()) and not is_checksum_address(text):
        raise InvalidArgument(f"{text!r} has a typing error: its checksum is wrong", field=field)
    return to_checksum_address(text)


def parse_hash(text: str, field: str) -> bytes:
    """32 bytes from 64 hex digits, with or without 0x. InvalidArgument: it is something else."""
    plain = text.removeprefix("0x").lower()
    if len(plain) != 64 or not set(plain) <= set("0123456789abcdef"):
        raise InvalidArgument(f"{text!r:.80} is not 64 hex digits", field=field)
    return bytes.fromhex(plain)


def parse_whole(text: str, field: str) -> int:
    """A whole number up to 40 digits, which is more than any amount here. InvalidArgument: it is something else."""
    if not text.isdecimal() or len(text) > 40:
        raise InvalidArgument(f"{text!r:.80} is not a whole number", field=field)
    return int(text)
