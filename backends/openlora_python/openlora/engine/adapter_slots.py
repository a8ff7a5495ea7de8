"""Which adapters are resident: a bounded number of slots, filled beside decoding, emptied least recently used first."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .api import AdapterUse
from .lora import Adapter


@dataclass(eq=False)
class _Slot:
    loading: Future[Adapter]
    pins: int = 0  # requests that need it; a pinned slot is never emptied


class AdapterSlots:
    """Adapters by digest. All calls come from the engine thread; only `read` runs on the loader thread."""

    def __init__(self, read: Callable[[str, str], Adapter], count: int, wake: Callable[[], None]) -> None:
        """`read(digest, path)` makes an adapter or raises; `wake` is called when one has arrived or failed."""
        self.count = count
        self._read = read
        self._wake = wake
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # least recently used first
        # Beside decoding, so with no threads of its own: see TorchEngine._run.
        self._loader = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="adapter-loader", initializer=_compute_alone
        )

    @property
    def loaded(self) -> int:
        return sum(slot.loading.done() for slot in self._slots.values())

    @property
    def pinned(self) -> int:
        return sum(slot.pins > 0 for slot in self._slots.values())

    def pin(self, uses: Sequence[AdapterUse]) -> bool:
        """Hold a slot for each adapter, all or none, and start the loads that this takes.

        All or none, because two requests that each hold half of what they need would wait for ever.
        """
        paths = {use.digest: use.path for use in uses}
        absent = [digest for digest in paths if digest not in self._slots]
        shortage = len(self._slots) + len(absent) - self.count
        if absent and shortage > 0:
            idle = [digest for digest, slot in self._slots.items() if slot.pins == 0 and digest not in paths]
            if shortage > len(idle):
                return False
            for digest in idle[:shortage]:
                self._slots.pop(digest).loading.cancel()
        for digest in absent:
            future = self._loader.submit(self._read, digest, paths[digest])
            self._slots[digest] = _Slot(future)
            future.add_done_callback(lambda _: self._wake())
        for digest in paths:
            self._slots[digest].pins += 1
            self._slots.move_to_end(digest)
        return True

    def resident(self, uses: Sequence[AdapterUse]) -> list[Adapter] | None:
        """The pinned adapters in the order of `uses`, or None while one is still loading.

        Raises what the loader raised (an `OpenLoRAError` for a bad adapter); the caller unpins then.
        """
        slots = [self._slots[use.digest] for use in uses]
        done = [slot.loading for slot in slots if slot.loading.done()]
        for loading in done:
            loading.result()
        return [slot.loading.result() for slot in slots] if len(done) == len(slots) else None

    def unpin(self, uses: Sequence[AdapterUse]) -> None:
        """Let go of what `pin` held. A load that failed is forgotten, so that a later request may try again."""
        for digest in {use.digest for use in uses}:
            slot = self._slots[digest]
            slot.pins -= 1
            if slot.pins == 0 and slot.loading.done() and slot.loading.exception() is not None:
                del self._slots[digest]

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)


def _compute_alone() -> None:
    """No OpenMP team for this thread. `torch.set_num_threads` would set it for all threads that come later, too."""
    torch.get_num_threads()  # torch sets its own number when it is first asked in a thread
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
