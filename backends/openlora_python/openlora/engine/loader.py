"""The thread that loads adapters: beside decoding, and out of its way."""

from __future__ import annotations

import ctypes
import os
import threading

import torch

from .residency import Residency

NICENESS = 5
"""Added to the process's own: a step that wants a core gets it before a load does."""


class Loader:
    """Carries out what a `Residency` wants loaded, one adapter at a time, until it is closed."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread once the load that runs is done."""
        self._residency.close()
        self._thread.join()

    def _run(self) -> None:
        _compute_alone()
        # Linux gives every thread a niceness of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        while self._residency.wait_for_work():
            self._residency.load_next()


def _compute_alone() -> None:
    """No OpenMP team for this thread. `torch.set_num_threads` would set it for all threads that come later, too."""
    torch.get_num_threads()  # torch sets its own number when it is first asked in a thread
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
