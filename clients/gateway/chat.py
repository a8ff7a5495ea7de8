"""Messages into a prompt: the chat template of the base model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from openlora.errors import InvalidArgument


class ChatTemplate:
    """Renders chats, and knows how much of the context a prompt leaves."""

    def __init__(self, model_dir: Path, max_model_len: int, max_tokens: int) -> None:
        # Not AutoTokenizer, which imports torch: seconds of start-up and 200 MB for a few lines of template.
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
        self._max_model_len = max_model_len
        self._max_tokens = max_tokens

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt, special tokens written out.

        Raises:
            InvalidArgument: the model has no template, or its template refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidArgument("the base model has no chat template: use /v1/completions", field="messages")
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidArgument(f"the model's chat template refuses them: {error}", field="messages") from error

    def room(self, prompt: str) -> int:
        """Tokens that an answer to `prompt` may have; at least 1, because a prompt too long is the server's to tell."""
        used = len(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return max(1, min(self._max_model_len - used, self._max_tokens))
