"""Structured output: which tokens a request's guide (JSON schema, expression, grammar) allows next, by llguidance.

A guide is read in a process of its own, then prepared on a thread beside the step loop; its request waits in the queue
until then and holds up nobody. The tokenizer, which masks need and nothing else here does, is loaded for the first
guide.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from ..errors import Internal, InvalidArgument, OpenLoRAError, UnsupportedModel
from ..processes.worker_process import run_worker
from .api import GUIDE_KINDS, MAX_GUIDE_BYTES, Guide, Sampling
from .guide_worker import CPU_SECONDS, LIMITS, Readable, Refused, one_line, read_guide

_CACHED_GUIDES = 32
# Masks are made between steps, so all of a request's masks together may take so long and no more. Usual ones take
# microseconds, once the first few have taught the lexer its states.
_MASK_SECONDS = 0.5
_MASK_SECONDS_PER_TOKEN = 0.001


@dataclass(frozen=True)
class CompiledGuide:
    """A guide before any output. `eos_token_ids` are the tokens that stand for the end in its masks."""

    matcher: LLMatcher
    eos_token_ids: list[int]


class GuideCompiler:
    """Prepares guides, and keeps those that were used last. `start` may be called from any thread."""

    def __init__(self, model_dir: str, vocab_size: int, eos_token_ids: Sequence[int], wake: Callable[[], None]) -> None:
        """`wake` is called whenever a guide is ready, or found to be bad."""
        self._tokenizer_file = Path(model_dir, "tokenizer.json")
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._wake = wake
        self._lock = threading.RLock()  # a guide that is ready at once calls back at once
        self._guides: OrderedDict[tuple[str, str], Future[CompiledGuide]] = OrderedDict()  # least recently used first
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guide-compiler")

    def start(self, guide: Guide) -> GuideState:
        """One request's guide. It is not ready yet, or already; if it is bad, `ready` will say so."""
        key = guide.kind, guide.text
        with self._lock:
            compiled = self._guides.get(key)
            if compiled is None:
                compiled = self._guides[key] = self._worker.submit(self._compile, guide)
                compiled.add_done_callback(lambda compiled: self._done(key, compiled))
                if len(self._guides) > _CACHED_GUIDES:
                    self._guides.popitem(last=False)
            else:
                self._guides.move_to_end(key)
        return GuideState(compiled, guide.field, self._vocab_size)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _done(self, key: tuple[str, str], compiled: Future[CompiledGuide]) -> None:
        if compiled.cancelled() or compiled.exception() is not None:
            with self._lock:
                if self._guides.get(key) is compiled:
                    del self._guides[key]  # the next request may have more luck
        self._wake()

    def _compile(self, guide: Guide) -> CompiledGuide:
        """Raises InvalidArgument for a bad guide, UnsupportedModel when no guide would do."""
        if guide.kind not in GUIDE_KINDS:
            raise InvalidArgument(f"{guide.kind!r:.40} is unknown, one of {', '.join(GUIDE_KINDS)} is right")
        if (size := len(guide.text.encode())) > MAX_GUIDE_BYTES:
            raise InvalidArgument(f"at most {MAX_GUIDE_BYTES} bytes, got {size}")
        grammar = self._read(guide)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidArgument(one_line(matcher.get_error()))
        return CompiledGuide(matcher, self._tokenizer.eos_tokens)

    def _read(self, guide: Guide) -> str:
        answers: list[Readable | Refused] = []
        if guide.kind == "json":
            answers.append(read_guide(guide))  # nothing of a stranger is in it
        else:
            end = run_worker("openlora.engine.guide_worker", guide, Readable | Refused, answers.append)
            if not answers and end.status > 0:
                raise Internal(f"the guide's process ended with status {end.status}: {end.complaint}")
        match answers:
            case [Readable(grammar)]:
                return grammar
            case [Refused(reason)]:
                raise InvalidArgument(reason)
        raise InvalidArgument(f"too large: reading it takes more than {CPU_SECONDS} s or too much memory")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not self._tokenizer_file.is_file():
            raise UnsupportedModel("the model has no tokenizer.json, which structured output needs")
        try:
            return LLTokenizer(
                self._tokenizer_file.read_text(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
            )
        except ValueError as error:
            raise UnsupportedModel(f"structured output can't use the model's tokenizer.json: {error}") from error


class GuideState:
    """Where one request's output stands in its guide: a function of the output, whose tokens are followed once each.

    Only the step loop's thread may use it.
    """

    def __init__(self, compiled: Future[CompiledGuide], field: str, vocab_size: int) -> None:
        self._compiled = compiled
        self._field = field
        self._vocab_size = vocab_size
        self._followed = 0
        self._seconds = 0.0

    @property
    def ready(self) -> bool:
        """Whether its request may run.

        Raises:
            InvalidArgument: it may not, for the guide is bad.
            UnsupportedModel: for this model can't have one.
        """
        if not self._compiled.done():
            return False
        error = self._compiled.exception()
        if error is None:
            return True
        if isinstance(error, InvalidArgument):
            raise InvalidArgument(error.message, field=self._field)
        if isinstance(error, OpenLoRAError):
            raise error
        raise Internal(f"preparing a guide failed: {type(error).__name__}: {error}") from error

    def complete(self, output: Sequence[int]) -> bool:
        """Whether nothing can follow `output`."""
        self._follow(output)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, output: Sequence[int], sampling: Sampling, *, may_end: bool) -> np.ndarray:
        """Which tokens may follow `output`, `[vocab]` of bool.

        Where the output may end, so may the request, if `may_end`: by one of its own EOS and stop tokens, or, if it
        knows none and nothing else is allowed, by one of the model's.

        Raises:
            InvalidArgument: the guide turned out to be too complex, or the model has no token that it allows.
        """
        started = time.thread_time()
        self._follow(output)
        bits = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        fill_next_token_bitmask(self._matcher, bits[None])
        if self._matcher.is_error():
            raise InvalidArgument(f"too complex: {one_line(self._matcher.get_error())}", field=self._field)
        self._seconds += time.thread_time() - started
        if self._seconds > _MASK_SECONDS + _MASK_SECONDS_PER_TOKEN * len(output):
            raise InvalidArgument("too complex: following it holds up the server", field=self._field)
        mask = np.unpackbits(bits.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)
        model_eos = self._compiled.result().eos_token_ids
        mask[model_eos] = False
        accepts = self._matcher.is_accepting()
        if accepts and may_end:
            mask[[*sampling.eos_token_ids, *sampling.stop_token_ids]] = True
            if not mask.any():
                mask[model_eos] = True
        if not accepts and not mask.any():
            raise InvalidArgument("no token of the model can go on", field=self._field)
        return mask

    @cached_property
    def _matcher(self) -> LLMatcher:
        return self._compiled.result().matcher.deep_copy()

    def _follow(self, output: Sequence[int]) -> None:
        new = list(output[self._followed :])
        if new:
            self._matcher.consume_tokens(new)
            self._followed = len(output)
