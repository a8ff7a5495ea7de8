"""The row of questions that `streams.py` asks of both sides, the same for every run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Question:
    prompt: str
    token_ids: tuple[int, ...]  # the prompt, as the server will tokenize it
    adapter: str | None
    new_tokens: int


class Work:
    """Question n: its adapter is the n-th of (base, first adapter, second …) in turn; its text is drawn with n."""

    def __init__(self, model: Path, adapters: Path, most_adapters: int, prompt_tokens: int, new_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        names = sorted(folder.name for folder in adapters.iterdir() if folder.is_dir())
        self.adapters = names[:most_adapters]

    def question(self, number: int) -> Question:
        """Answers are half to one and a half times `new_tokens` long, so that arrivals spread over the steps."""
        draw = random.Random(number)
        choices = (None, *self.adapters)
        text = ""
        while len(ids := self._tokenizer.encode(text).ids) < self._prompt_tokens:
            text += f" {''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=3))}"
        length = draw.randint(self._new_tokens // 2, self._new_tokens * 3 // 2)
        return Question(text, tuple(ids), choices[number % len(choices)], length)
