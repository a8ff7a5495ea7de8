"""Text in and out, the same for every engine: tokens of a prompt, text of tokens, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..errors import Internal, InvalidArgument, OpenLoRAError


class TextCodec:
    """The base model's tokenizer, from its `tokenizer.json`."""

    def __init__(self, model_dir: Path) -> None:
        file = model_dir / "tokenizer.json"
        if not file.is_file():
            raise InvalidArgument(f"{file} is missing: a fast tokenizer is needed", field="model")
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        # As a batch of one: only that lets other threads run meanwhile, and it keeps no offsets.
        (encoding,) = _guarded(self.tokenizer.encode_batch_fast, [text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as the tokens it has at the start of a text and after a space (vLLM's two forms)."""
        forms: dict[tuple[int, ...], None] = {}
        for word in words:
            for form in (word.lstrip(), " " + word.lstrip()):
                ids = self.encode(form, add_special_tokens=False)
                if ids:
                    forms[ids] = None
        return tuple(forms)

    def piece(self, token_id: int) -> str:
        """One token on its own, as logprobs show it."""
        return _guarded(self.tokenizer.decode, [token_id], skip_special_tokens=False)


class TextAssembler:
    """Turns a request's token ids into text that may be shown.

    Text is held back while it may still become a stop string: never does a part of one reach a client. The sum of
    everything released equals `decode(all ids)` up to the stop.
    """

    def __init__(
        self,
        codec: TextCodec,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = codec.tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)  # empty: seeding could leak the prompt
        self._ids: list[int] = []
        self._begin = 0  # the id from which `_decoded` counts
        self._decoded: list[str] = []  # text since then, released or held, piece by piece
        self._next = 0  # the first id that has given no text yet
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token sets free; `stopped` is then true if it completed a stop string."""
        self._ids.append(token_id)
        return self._release(self._decode_next(token_id))

    def finish(self) -> str:
        """What was still held, and U+FFFD for bytes that never became a character; nothing after a stop string."""
        if self.stopped:
            return ""
        released = self._release(self._rest()) + self._held
        self._held = ""
        return released

    def _release(self, piece: str) -> str:
        """What may be shown of the held text and `piece`; of several stop strings the one that ends first counts."""
        self._decoded.append(piece)
        if not self._stop:
            return piece
        self._held += piece
        if found := [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            end, begin = min(found)
            self.stopped = True
            released, self._held = self._held[: end if self._include_stop else begin], ""
            return released
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def _decode_next(self, token_id: int) -> str:
        try:
            piece = _guarded(self._stream.step, self._tokenizer, token_id) or ""
        except OpenLoRAError:
            raise
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise Internal(f"token {token_id} can't be decoded: {error}") from error
            # The decoder rewrote text that is out already (a run of byte tokens turned invalid): go on behind it.
            self._begin, self._decoded = self._next, []
            self._stream = DecodeStream(ids=self._ids[self._begin :], skip_special_tokens=self._skip_special)
            piece = self._rest()
        if piece:
            self._next = len(self._ids)
        return piece

    def _rest(self) -> str:
        """Text of the ids so far that was not given out yet."""
        whole, known = self._decode(self._begin), "".join(self._decoded)
        return whole[len(known) :] if whole.startswith(known) else self._decode(self._next)

    def _decode(self, begin: int) -> str:
        return _guarded(self._tokenizer.decode, self._ids[begin:], skip_special_tokens=self._skip_special)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _guarded(call, *arguments, **options):  # noqa: ANN001, ANN002, ANN003, ANN202 - a transparent wrapper
    """A Rust panic in the tokenizer is a BaseException: it must end this request, not the thread it runs on."""
    try:
        return call(*arguments, **options)
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise Internal(f"the tokenizer failed: {error}") from error
        raise
