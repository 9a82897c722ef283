"""Messages to a prompt, by the model's own chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from headrace.base.errors import InvalidRequestError, TemplateError
from headrace.text.sandbox import MAX_CHARS, BoundedEnvironment, RefusalError
from headrace.text.tokenizer import Tokenizer, read_json, token_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
PART_SEPARATOR = "\n"
"""Between the text parts of one message, as in vLLM and llama.cpp."""


class ConversationRefusedError(TemplateError, InvalidRequestError):
    """A chat template's own refusal of a conversation: roles that do not alternate, a system message, and so on."""

    code = "conversation_refused"


class ChatTemplate:
    """A model's chat template, compiled once. Safe to use from several threads.

    The rendered text equals that of Transformers' ``apply_chat_template``. It holds its own beginning-of-sequence
    token where the model wants one, so encode it with ``add_special_tokens=False``.

    Args:
        source: jinja source; or several by name, of which ``tool_use`` is used where tools are given and ``default``
            otherwise; or None where the model has none, and every rendering is an error that says so.
        special_tokens: what the template may refer to: ``bos_token``, ``eos_token``, ….

    Raises:
        TemplateError: the source cannot be compiled.
    """

    def __init__(self, source: str | Mapping[str, str] | None, special_tokens: Mapping[str, str] | None = None) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self._special_tokens = dict(special_tokens or {})
        self._environment = BoundedEnvironment()
        if not all(isinstance(text, str) for pair in sources.items() for text in pair):
            raise TemplateError("The chat template is not text.", _REPLACE)
        self._templates = {name: self._compile(text) for name, text in sources.items()}

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> "ChatTemplate":
        """Load from a Hugging Face folder: ``chat_template.jinja``, or else the entry of ``tokenizer_config.json``."""
        folder = Path(path)
        config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
        special_tokens = {
            name: text for name, value in config.items() if name.endswith("_token") and (text := token_text(value))
        }
        return cls(folder_sources(folder), special_tokens)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> "ChatTemplate":
        """Take ``tokenizer.chat_template`` (and its named variants) from a GGUF file's metadata."""
        prefix = "tokenizer.chat_template."
        sources = {key.removeprefix(prefix): text for key, text in metadata.items() if key.startswith(prefix)}
        if (default := metadata.get("tokenizer.chat_template")) is not None:
            sources["default"] = default
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_TOKENS.items()}
        tokens = {name: tokenizer.id_to_token(token_id) for name, token_id in ids.items() if token_id is not None}
        return cls(sources, {name: token for name, token in tokens.items() if token is not None})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, the content a string or a list of text parts.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of the functions that the model may call.
            variables: whatever else the template takes (``enable_thinking``, …).

        Raises:
            InvalidRequestError: a message is malformed, or holds something that is not text.
            ConversationRefusedError: the template refuses the conversation, in its own words.
            TemplateError: there is no template, or it fails.
        """
        template = self._choose(tools)
        conversation = _checked(messages)
        context = {
            "messages": conversation,
            "tools": _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **_plain(variables, "the template's variables"),
        }
        self._environment.start_clock()
        pieces, size = [], 0
        try:
            for piece in template.generate(context):
                self._environment.check_clock()
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARS:
                    raise TemplateError(f"The chat template writes more than {MAX_CHARS:,} characters.", _REPLACE)
        except RefusalError as error:
            raise ConversationRefusedError(
                f"The chat template refuses the conversation: {error}", "Change the messages accordingly."
            ) from None
        except TemplateError:
            raise
        except Exception as error:  # a template is a program and can fail in any way, by RecursionError too
            raise TemplateError(f"The chat template fails: {error or type(error).__name__}.", _REPLACE) from error
        return "".join(pieces)

    def _compile(self, source: str) -> Any:
        try:
            return self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"The chat template is wrong in line {error.lineno}: {error.message}.", _REPLACE
            ) from error
        except Exception as error:  # nesting too deep to compile, for one
            raise TemplateError(f"The chat template cannot be compiled: {error}.", _REPLACE) from error

    def _choose(self, tools: Sequence[Any] | None) -> Any:
        if not self._templates:
            raise TemplateError(
                "The model has no chat template.", "Give it a plain prompt, or use its instruction-tuned variant."
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(
                f"The model has no default chat template, only {', '.join(self._templates)}.",
                "Construct ChatTemplate with the source of one of them.",
            )
        return self._templates[name]


_REPLACE = "Use the template of the model's current revision."
_GGUF_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def folder_sources(folder: Path) -> Any:
    """The templates of a Hugging Face folder: jinja source, sources by name, or None. Unchecked."""
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}
    if (file := folder / "chat_template.json").exists():
        source = read_json(file).get("chat_template", source)
    if (file := folder / "chat_template.jinja").exists():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        source = {"default": _read(file), **{other.stem: _read(other) for other in more}}
    return source


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TemplateError(f"{path} cannot be read: {error}.", "Download the file again.") from error


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as plain data, each content a string (or absent, where a message carries only tool calls)."""
    if isinstance(messages, str | Mapping) or not messages:
        raise InvalidRequestError(
            "The conversation is not a list of messages." if messages else "The conversation is empty.",
            'Send messages such as [{"role": "user", "content": "Hello"}].',
        )
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"Message {index} is a {type(message).__name__}, not an object.", "Give it a role and a content."
        )
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError(f"Message {index} has the role {role!r}.", f"Use one of: {', '.join(ROLES)}.")
    # A key with null is as good as absent, in the OpenAI API and in Transformers; templates handle only the latter.
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None}, f"message {index}")
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = PART_SEPARATOR.join(_part_text(index, part) for part in content)
    elif content is None and role == "assistant" and plain.get("tool_calls"):
        pass
    elif not isinstance(content, str):
        raise InvalidRequestError(
            f"Message {index} has {'no content' if content is None else 'a content that is not text'}.",
            "Its content must be a string or a list of text parts.",
        )
    return plain


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequestError(
        f"Message {index} holds a part of type {kind!r}.",
        'This model takes text only: {"type": "text", "text": "..."}.',
    )


def _plain(value: Any, what: str) -> Any:
    """A copy of JSON data made of exact JSON types, so that a template meets no object with methods of its own."""
    try:
        return json.loads(json.dumps(value, default=_mapping))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"There is something other than JSON data in {what}: {error}.", "") from error


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON data")
