"""Responses of the OpenAI API, whole and in chunks.

A stream writes one small JSON per token, so its chunks are put together from parts that are encoded once: only the new
text passes through the JSON encoder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.engine.metrics import RequestMetrics
from headrace.llm.outputs import Delta, RequestOutput, TokenLogprob
from headrace.serve.logprobs import CompletionLogprobs, chat_logprobs
from headrace.serve.model import TokenTexts

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What all parts of a reply repeat."""

    id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """Tokens over all prompts of a request; a prompt counts once, however many samples were drawn from it."""
    num_prompt = sum(one.num_prompt_tokens for one in metrics)
    num_output = sum(one.num_output_tokens for one in metrics)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached_tokens for one in metrics)},
    }


class Choice(Protocol):
    """One endpoint's way of putting one sample into JSON. Texts come as the members that stand first in a choice."""

    kind: str
    """``object`` of a whole reply."""
    chunk_kind: str
    """``object`` of a chunk."""

    def opening(self) -> str | None:
        """What a stream says before the first text, if anything."""
        ...

    def more(self, text: str) -> str:
        """What a stream says of new text."""
        ...

    def logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens' logprobs; to be called in the tokens' order."""
        ...

    def whole(self, text: str) -> dict[str, Any]:
        """What a reply that is not streamed says of the whole text."""
        ...


class ChatChoice:
    """``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def opening(self) -> str | None:
        return '"delta":{"role":"assistant","content":"","refusal":null}'

    def more(self, text: str) -> str:
        return '"delta":{"content":' + encode(text) + "}" if text else '"delta":{}'

    def logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return chat_logprobs(entries, self._texts)

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class CompletionChoice:
    """``/v1/completions``; `echo` is the prompt's text where it shall precede the output.

    With `names_ids`, logprobs name tokens ``token_id:N``.
    """

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, texts: TokenTexts, echo: str = "", *, names_ids: bool = False) -> None:
        self._echo = echo
        self._logprobs = CompletionLogprobs(texts, names_ids=names_ids)

    def opening(self) -> str | None:
        return self.more(self._echo) if self._echo else None

    def more(self, text: str) -> str:
        return '"text":' + encode(text)

    def logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._logprobs.extend(entries)

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": self._echo + text}


def whole_reply(
    head: ReplyHead, choices: Sequence[Choice], outputs: Sequence[RequestOutput], *, with_versions: bool
) -> bytes:
    """The body of a reply that is not streamed; choices are numbered prompt by prompt."""
    samples = [(output.prompt_logprobs or [], sample) for output in outputs for sample in output.outputs]
    listed = [
        {
            "index": index,
            **choice.whole(sample.text),
            "logprobs": None if sample.logprobs is None else choice.logprobs([*of_prompt, *sample.logprobs]),
            "finish_reason": sample.finish_reason,
            **({"weight_versions": sample.weight_versions} if with_versions else {}),
        }
        for index, (choice, (of_prompt, sample)) in enumerate(zip(choices, samples, strict=True))
    ]
    used = usage([output.metrics for output in outputs])
    return encode({**head.fields(choices[0].kind), "choices": listed, "usage": used}).encode()


class EventWriter:
    """A reply as server-sent events.

    With versions, a chunk says of which weights the tokens are that came since the last chunk of its choice.
    """

    def __init__(
        self, head: ReplyHead, choices: Sequence[Choice], *, include_usage: bool, with_versions: bool = False
    ) -> None:
        self._choices = choices
        self._include_usage = include_usage
        self._head = "data: " + encode(head.fields(choices[0].chunk_kind))[:-1] + ',"choices":['
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._opened: set[int] = set()
        self._versions: dict[int, list[int]] | None = {i: [] for i in range(len(choices))} if with_versions else None

    def events(self, index: int, delta: Delta) -> str:
        """The chunks for what a choice gained; empty where it gained nothing that can be shown yet."""
        choice = self._choices[index]
        opening = ""
        if index not in self._opened:
            self._opened.add(index)
            members = choice.opening()
            opening = self._chunk(index, members, "null", "null") if members else ""
        if self._versions is not None:
            self._versions[index] += delta.weight_versions
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return opening
        logprobs = encode(choice.logprobs(delta.logprobs)) if delta.logprobs else "null"
        finish = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        more = choice.more(delta.text)
        if self._versions is not None:
            more += f',"weight_versions":{encode(self._versions[index])}'
            self._versions[index] = []
        return opening + self._chunk(index, more, logprobs, finish)

    def ending(self, metrics: Sequence[RequestMetrics]) -> bytes:
        """The usage, if it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        return f'{self._head}],"usage":{encode(usage(metrics))}}}\n\n'.encode() + DONE

    def _chunk(self, index: int, members: str, logprobs: str, finish: str) -> str:
        return f'{self._head}{{"index":{index},{members},"logprobs":{logprobs},"finish_reason":{finish}}}{self._tail}'
