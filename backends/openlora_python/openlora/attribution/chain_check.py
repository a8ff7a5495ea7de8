"""What the chain's head says of a log, kept beside the log: written by the anchor worker, read by the attribution step.

`<state-dir>/log/chain_check.json`. A state directory that was restored from a backup, or copied, has a log that is
behind the head that was anchored from it, or another one than that; only the chain shows it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import Internal
from .frames import sync_directory

NAME = "chain_check.json"

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ChainCheck(BaseModel):
    """One comparison. `consistent`: the log begins with what was anchored, the worker may go on; `behind`: it has
    fewer leaves; `forked`: it has others. After the last two the log must never sign a checkpoint again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_id: Hex32
    verdict: Literal["consistent", "behind", "forked"]
    head_size: Annotated[int, Field(ge=0)]
    head_root: Hex32
    log_size: Annotated[int, Field(ge=0)]
    checked_at: float  # seconds since 1970

    def save(self, state_dir: Path) -> None:
        """Replace the file, durably."""
        path = state_dir / "log" / NAME
        draft = path.with_name(f".{NAME}.{os.getpid()}")
        with draft.open("w") as file:
            file.write(self.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        sync_directory(path.parent)

    @classmethod
    def load(cls, state_dir: Path) -> ChainCheck | None:
        """The last one, None if there was none. Internal: the file can't be read or is no such thing."""
        path = state_dir / "log" / NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise Internal(f"{path} is not a comparison with the chain: {' '.join(str(error).split())}") from error
