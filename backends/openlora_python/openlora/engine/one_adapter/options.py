"""Settings that all engines with one adapter per request understand; each engine adds its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ...errors import InvalidArgument

Options = TypeVar("Options", bound="OneAdapterOptions")


@dataclass(frozen=True, kw_only=True)
class OneAdapterOptions:
    """Plain values, so that a recipe, a YAML file or a test can fill them."""

    __pydantic_config__ = {"extra": "forbid"}

    dtype: str = "auto"
    quantization: str = "none"  # none = as the checkpoint is
    max_model_len: int | None = None  # prompt and output together; None = the model's own limit
    max_batch: int = 64
    max_waiting: int = 1024
    max_step_tokens: int = 8192
    max_adapters: int = 8  # device slots: distinct adapters in one step
    host_adapters: int | None = None  # in host memory; None = four times the slots
    max_rank: int = 64  # of one adapter, and of the sum of an ensemble's
    prefix_cache: bool = True
    kv_cache_bytes: int | None = None  # None = what the engine takes by itself
    tensor_parallel_size: int = 1
    threads: int | None = None
    staging_dir: str | None = None  # for written-out adapters, emptied at start; None = one that is made
    max_ensembles: int = 256  # weighted adapters and sums of several, written out per engine life
    max_adapter_ids: int = 4096  # ids per engine life: the engine remembers each for ever
    max_staged_bytes: int = 8 << 30  # on disk, of written-out adapters that nobody uses at the moment

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value is not None and value < 1:
                raise InvalidArgument(f"{value} is too small, at least 1 is right", field=field.name)
        if self.host_adapters is not None and self.host_adapters < self.max_adapters:
            raise InvalidArgument(
                f"{self.host_adapters} is too small, at least max_adapters = {self.max_adapters} is right",
                field="host_adapters",
            )

    @property
    def adapters_in_host_memory(self) -> int:
        return self.host_adapters or 4 * self.max_adapters


def options_of(kind: type[Options], given: dict[str, Any]) -> Options:
    """`given` as options of `kind`.

    Raises:
        InvalidArgument: naming what `kind` does not have.
    """
    known = {field.name for field in fields(kind)}
    if unknown := sorted(given.keys() - known):
        raise InvalidArgument(f"no such option, one of {', '.join(sorted(known))} is right", field=unknown[0])
    return kind(**given)
