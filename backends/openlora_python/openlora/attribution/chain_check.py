"""What the chain's head says of a log, kept beside the log: written by the anchor worker, read by the attribution step.

`<state-dir>/log/chain_check.json`. A state directory that was restored from a backup, or copied, has a log that is
behind the head that was anchored from it, or another one than that; only the chain shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import Internal, Unavailable
from .checkpoint import Checkpoint
from .file_identity import file_identity
from .frames import sync_directory
from .log_key import LogKey

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ChainCheck(BaseModel):
    """One comparison. `consistent`: the log begins with what was anchored, the worker may go on; `behind`: it has
    fewer leaves; `forked`: it has others. After the last two the log is closed when the server starts the next time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_id: Hex32
    verdict: Literal["consistent", "behind", "forked"]
    head_size: Annotated[int, Field(ge=0)]
    head_root: Hex32
    log_size: Annotated[int, Field(ge=0)]
    file: str  # the `file_identity` of what was compared: a check from before a copy or a restore says nothing of it
    checked_at: float  # seconds since 1970

    def save(self, state_dir: Path) -> None:
        """Replace the file, durably."""
        path = check_path(state_dir)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with draft.open("w") as file:
            file.write(self.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        sync_directory(path.parent)

    @classmethod
    def load(cls, state_dir: Path) -> ChainCheck | None:
        """The last one, None if there was none. Internal: the file can't be read or is no such thing."""
        path = check_path(state_dir)
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise Internal(f"{path} is not a comparison with the chain: {' '.join(str(error).split())}") from error


def anchored_head(state_dir: Path) -> Callable[[LogKey], Checkpoint | None]:
    """Who saw the log's trees, for `custody.settle_custody`: the chain, by its last comparison with this very file.

    None: nothing of the log was ever anchored. Unavailable: the anchor worker has not compared this file yet.
    """

    def newest(key: LogKey) -> Checkpoint | None:
        check = ChainCheck.load(state_dir)
        database = state_dir / "log" / "receipts.sqlite"
        if check is None or check.log_id != key.log_id.hex() or check.file != file_identity(database):
            raise Unavailable(
                f"the log in {database} was not compared with the chain since it was copied or restored: "
                "`openlora settle anchor` does it"
            )
        return Checkpoint(key.origin, check.head_size, bytes.fromhex(check.head_root)) if check.head_size else None

    return newest


def check_path(state_dir: Path) -> Path:
    return state_dir / "log" / "chain_check.json"
