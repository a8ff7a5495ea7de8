"""The process that merges: compute into a scratch directory, validate like any other adapter, admit, catalogue.

`python -m openlora.adapters.merge_worker` takes one `MergeRequest` and answers with `ModuleMerged` and a `MergeResult`.
One merge at a time in a state directory; adding adapters and starting the server only wait for its last step.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from ..errors import OpenLoRAError, Unavailable
from ..processes.worker_process import Fatal, take_request
from .cache_quota import CacheRoom
from .catalog import Catalog
from .catalog_file import CATALOG_FILE
from .catalog_rows import AdapterRecord
from .ingest_worker import CACHE_DIRECTORY
from .leases import Leases
from .manifest import CONFIG_FILE, WEIGHTS_FILE
from .merge import MergeRequest, MergeResult, ModuleMerged, Prepared, prepare, result, source_of
from .merge_files import write_merged
from .store import AdapterStore, SourceDirectory
from .weights import MAX_HEADER_BYTES, validate_adapter

SCRATCH_DIRECTORY = "merging"  # below the state directory
SPARE_BYTES = 64 << 20  # of a file beyond the weights: the header, and the catalog's own files

Report = Callable[[msgspec.Struct], None]


def run(request: MergeRequest, report: Report) -> MergeResult:
    """Compute what `request` asks for, unless a merge that just ended was the same.

    Raises:
        OpenLoRAError: see `merge.merge`.
    """
    state_dir = Path(request.state_dir)
    leases = Leases(AdapterStore(state_dir / CACHE_DIRECTORY).directory)
    sources = {source.digest for source in request.plan.sources}
    with _scratch(state_dir / SCRATCH_DIRECTORY) as directory, leases.of(sources):
        prepared = prepare(request)
        if isinstance(prepared, MergeResult):
            return prepared
        total = len(prepared.layout)
        _limit_file_size(sum(module.bytes for module in prepared.layout) + SPARE_BYTES)
        write_merged(
            directory,
            request.plan,
            prepared.sources,
            prepared.layout,
            prepared.modules,
            lambda done, module: report(ModuleMerged(done, total, module)),
        )
        return _admitted(request, prepared, directory)


def _admitted(request: MergeRequest, prepared: Prepared, directory: Path) -> MergeResult:
    base, state_dir = request.base, Path(request.state_dir)
    store = AdapterStore(state_dir / CACHE_DIRECTORY)
    limit = prepared.modules.largest_adapter_bytes(base.max_rank) + MAX_HEADER_BYTES
    with store.writing(), SourceDirectory(directory) as source, store.incoming() as incoming:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            incoming.copy(source, name, limit, lambda size: None)
        facts = validate_adapter(request.name, incoming.directory, None, prepared.modules, base.digest, base.max_rank)
        CacheRoom(state_dir / CATALOG_FILE, store, request.cache).make(incoming.manifest().digest, incoming.size)
        record = AdapterRecord(
            request.name,
            0,
            store.admit(incoming),
            facts.rank,
            "ready",
            "",
            request.card,
            facts.target_modules,
            base.digest,
            source_of(request.plan),
        )
        with Catalog(state_dir / CATALOG_FILE) as catalog:
            return result(*catalog.put(record), request.plan, computed=True)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory for one merge, when no other is running; leftovers are those of a merge that was killed."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(parent / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in parent.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=parent) as directory:
            yield Path(directory)


def _limit(request: MergeRequest) -> None:
    """Bounds on CPU time and memory, from here on; a core file of a killed merge would hold the adapters."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = request.limits.max_cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    before = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")  # data and stack
    most = before + request.limits.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main() -> None:
    request, report = take_request(MergeRequest)
    torch.set_num_threads(1)  # an SVD's last bits depend on the number of threads
    _limit(request)
    try:
        report(run(request, report))
    except OpenLoRAError as error:
        report(Fatal(str(error)))
    except OSError as error:  # a full disk
        report(Fatal(str(Unavailable(f"the merge could not be written: {error}"))))


if __name__ == "__main__":
    main()
