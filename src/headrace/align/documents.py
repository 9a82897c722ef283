"""Text that a user brings, to calibrate on, to judge by, to train on or to compare on: a file, in tokens."""

import json
from pathlib import Path

from headrace.base.errors import InvalidRequestError
from headrace.llm.text_side import TextSide

_REMEDY = 'Give plain text, or a .jsonl file of {"text": …} or {"messages": [{"role": …, "content": …}]} a line.'


def read_tokens(path: Path, text: TextSide) -> list[int]:
    """A file's documents in tokens, one after the other.

    A ``.jsonl`` file has a document a line: its ``text``, or its ``messages`` as the model's chat template writes them.
    Any other file is one document.

    Raises:
        InvalidRequestError: the file cannot be read, is not UTF-8, or a line of it is no document.
        TemplateError: the model has no chat template that takes such messages.
    """
    content = read_text(path)
    if path.suffix != ".jsonl":
        return text.tokenizer.encode(content)
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    return [token for number, line in lines for token in _document(f"Line {number} of {path}", line, text)]


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises InvalidRequestError if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"Cannot read {path}: {error}.", "Name a readable UTF-8 text file.") from None


def _document(where: str, line: str, text: TextSide) -> list[int]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"{where} is no JSON: {error}.", _REMEDY) from None
    match record:
        case {"text": str(plain)}:
            return text.tokenizer.encode(plain)
        case {"messages": [*messages]} if messages and all(isinstance(message, dict) for message in messages):
            rendered = text.template.render(messages, add_generation_prompt=False)
            return text.tokenizer.encode(rendered, add_special_tokens=False)
    raise InvalidRequestError(f"{where} has neither text nor messages.", _REMEDY)
