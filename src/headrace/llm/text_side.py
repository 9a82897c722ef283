"""What turns text into tokens and back, each part made when it is first needed: token ids alone need little of it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from headrace.base.errors import TemplateError
from headrace.formats.checkpoint import Checkpoint
from headrace.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headrace.text.chat_template import ChatTemplate


class TextSide:
    """A tokenizer, and a chat template. A template that is missing or broken hurts chat alone. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, make_template: "Callable[[], ChatTemplate]") -> None:
        self.tokenizer = tokenizer
        self._make_template = make_template
        self._template: ChatTemplate | TemplateError | None = None
        self._making = threading.Lock()

    @property
    def template(self) -> "ChatTemplate":
        """The model's chat template. Raises TemplateError, every time, where there is none that works."""
        with self._making:
            if self._template is None:
                try:
                    self._template = self._make_template()
                except TemplateError as error:
                    self._template = error
        if isinstance(self._template, TemplateError):
            raise self._template
        return self._template

    def prepare(self) -> None:
        """Make now what the first text and the first conversation would wait for.

        Raises CheckpointError for a vocabulary that nothing can be encoded with.
        """
        self.tokenizer.prepare()
        with suppress(TemplateError):  # it is for whoever asks for a chat
            _ = self.template


def load_text(checkpoint: Checkpoint) -> TextSide:
    """A checkpoint's tokenizer and template. Raises CheckpointError or UnsupportedModelError for its tokenizer."""
    if checkpoint.kind == "hf":
        return TextSide(Tokenizer.from_hf_folder(checkpoint.folder), lambda: _folder_template(checkpoint))
    tokenizer = Tokenizer.from_gguf_metadata(checkpoint.config, prepared=False)
    return TextSide(tokenizer, lambda: _gguf_template(checkpoint, tokenizer))


def _folder_template(checkpoint: Checkpoint) -> "ChatTemplate":
    from headrace.text.chat_template import ChatTemplate  # brings jinja

    return ChatTemplate.from_hf_folder(checkpoint.folder)


def _gguf_template(checkpoint: Checkpoint, tokenizer: Tokenizer) -> "ChatTemplate":
    from headrace.text.chat_template import ChatTemplate

    return ChatTemplate.from_gguf_metadata(checkpoint.config, tokenizer)
