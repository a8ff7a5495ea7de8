"""An engine in this process, adapters for it, and what it said of each request: what `residency.py` measures with."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from make_shape import TARGETS, make_adapter
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM

from openlora.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, adapter_manifest
from openlora.engine.api import WEIGHT_ONE, AdapterUse, EngineOutput, EngineRequest, Sampling
from openlora.engine.torch_engine import TorchEngine

WAIT_SECONDS = 300


@dataclass
class Told:
    """What the engine said of one request."""

    submitted: float
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class Watched:
    """An engine, and when each request got its tokens. `on_end` is called for each that ends."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.requests: dict[str, Told] = {}
        self.errors: list[str] = []
        self.on_end: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._names = itertools.count()

    def take(self, outputs: list[EngineOutput]) -> None:
        now, ended = time.perf_counter(), 0
        with self._changed:
            for output in outputs:
                told = self.requests[output.request_id]
                told.times += [now] * len(output.token_ids)
                told.ids += output.token_ids
                told.ended = bool(output.finish_reason)
                ended += told.ended
                if output.error:
                    self.errors.append(output.error)
            self._changed.notify_all()
        for _ in range(ended):
            self.on_end()

    def submit(self, prompt: Sequence[int], use: AdapterUse | None, new_tokens: int) -> Told:
        name, told = str(next(self._names)), Told(time.perf_counter())
        self.requests[name] = told
        adapters = () if use is None else (use,)
        self.engine.submit(EngineRequest(name, tuple(prompt), adapters, Sampling(new_tokens, temperature=0.0)))
        return told

    def wait(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(happened, WAIT_SECONDS):
                raise TimeoutError(f"nothing for {WAIT_SECONDS} s; the engine stopped with {self.engine.failed}")

    def ask(self, prompt: Sequence[int], use: AdapterUse | None, new_tokens: int) -> Told:
        told = self.submit(prompt, use, new_tokens)
        self.wait(lambda: told.ended)
        return told


@contextmanager
def running(options: argparse.Namespace, **settings: Any) -> Iterator[Watched]:
    torch.set_num_threads(options.threads)
    engine = TorchEngine(str(options.model), "0" * 64, max_model_len=1024, kv_cache_tokens=32_768, **settings)
    watched = Watched(engine)
    engine.start(watched.take)
    try:
        yield watched
    finally:
        engine.shutdown()


def adapters_of(options: argparse.Namespace, ranks: Sequence[int], console: Console) -> list[Path]:
    """One adapter of each rank, made where it is not there yet."""
    config = AutoConfig.from_pretrained(options.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    form = sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()[:8]
    paths = [options.work / form / f"{number:04d}-r{rank}" for number, rank in enumerate(ranks)]
    for number, path in track([*enumerate(paths)], "making adapters", console=console, transient=True):
        if not (path / "adapter_config.json").is_file():
            make_adapter(path, shapes, ranks[number], TARGETS, config.dtype, seed=number)
    return paths


def use_of(path: Path, life: object = "", *, pinned: bool = False) -> AdapterUse:
    """The adapter of a directory; under another `life` it has another digest, so the engine does not know it yet."""
    if life != "":
        other = path.with_name(f"{path.name}-{life}")
        if not other.is_dir():
            other.mkdir()
            (other / WEIGHTS_FILE).hardlink_to(path / WEIGHTS_FILE)
            config = json.loads((path / CONFIG_FILE).read_bytes())
            (other / CONFIG_FILE).write_text(json.dumps({**config, "revision": f"{life}"}))
        path = other
    return AdapterUse(adapter_manifest(path).digest, str(path.resolve()), WEIGHT_ONE, pinned)


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    os.sync()  # pages that are not written yet stay
    for path in paths:
        for file in path.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def prompts(engine: TorchEngine, seed: object, length: int) -> Iterator[list[int]]:
    draw = random.Random(f"{seed}")
    while True:
        yield draw.choices(range(3, engine.info.vocab_size), k=length)
