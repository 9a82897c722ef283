"""`AsyncLLM` without a model: bytes as tokens, scripted replies, delays, failures, and countable KV blocks."""

import asyncio
import codecs
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from headrace.base.errors import ContextLengthError, HeadraceError, InvalidRequestError, TemplateError
from headrace.engine.metrics import EngineMetrics, EngineSnapshot, RequestMetrics
from headrace.engine.sampling import SamplingParams
from headrace.llm.inbox import Inbox
from headrace.llm.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprob

BLOCK_SIZE = 16


class ByteTokenizer:
    """Token ids are bytes; 256 ends a sequence and has no text."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def echo_reply(prompt: str, sample: int) -> str:
    """The default script: an answer that differs by prompt and sample."""
    return f"[{sample}] you said: {prompt[-200:]}"


class FakeLLM:
    """Replies with a script, one byte per token, `delay` seconds apart.

    Args:
        reply: (prompt text, sample index) to the text that is produced; it ends with an end-of-sequence token.
        delay: seconds between tokens; 0 yields to the event loop only.
        max_num_seqs: requests that run at once; others wait.
        fail_after: raise `failure` after this many tokens.
    """

    model_name = "fake"
    max_model_len = 4096
    num_blocks = 1000

    def __init__(
        self,
        *,
        reply: Callable[[str, int], str] = echo_reply,
        delay: float = 0.0,
        max_num_seqs: int = 64,
        fail_after: int | None = None,
        failure: Exception | None = None,
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.reply = reply
        self.delay = delay
        self.fail_after = fail_after
        self.failure = failure or HeadraceError("The step failed.", "Try again.", code="executor_failed")
        self.is_healthy = True
        self.num_waiting = 0
        self.num_running = 0
        self.num_free_blocks = self.num_blocks
        self.num_output_tokens = 0
        self.num_started = 0
        self.is_open = False
        self.seen: list[tuple[str, SamplingParams]] = []
        self._slots = asyncio.Semaphore(max_num_seqs)

    async def start(self) -> None:
        self.is_open = True

    async def aclose(self) -> None:
        self.is_open = False

    def render_chat(self, messages: list[dict[str, Any]], **_: Any) -> list[int]:
        if any(message["content"] == "refuse me" for message in messages):
            raise TemplateError("The template refuses the conversation.", "Change it.")
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.tokenizer.encode(text + "assistant: ")

    def engine_snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_blocks_total=self.num_blocks,
            kv_blocks_in_use=self.num_blocks - self.num_free_blocks,
            kv_blocks_cached=0,
            weight_version=0,
            metrics=EngineMetrics(output_tokens=self.num_output_tokens),
        )

    async def stream(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        prompt_ids = self._check(prompt, params)
        text = self.tokenizer.decode(prompt_ids)
        self.seen.append((text, params))
        async with self._running(len(prompt_ids), params.n):
            outputs = [self._produce(text, sample, params) for sample in range(params.n)]
            num_tokens = 0
            longest = max(map(len, outputs))
            for position in range(longest):
                await asyncio.sleep(self.delay)
                if position == self.fail_after:
                    raise self.failure
                for sample, deltas in enumerate(outputs):
                    if position < len(deltas):
                        num_tokens += 1
                        self.num_output_tokens += 1
                        is_last = position == longest - 1 and sample == _last_of(outputs)
                        yield (
                            _with_metrics(deltas[position], len(prompt_ids), num_tokens)
                            if is_last
                            else deltas[position]
                        )

    @contextlib.asynccontextmanager
    async def submit(
        self, prompts: list[str | list[int]], params: SamplingParams, *, request_ids: list[str]
    ) -> AsyncGenerator[Inbox, None]:
        inbox = Inbox(len(prompts))
        pumps = [
            asyncio.create_task(self._pump(inbox, index * params.n, self.stream(prompt, params)))
            for index, prompt in enumerate(prompts)
        ]
        try:
            yield inbox
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, inbox: Inbox, first_choice: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    inbox.put(first_choice + delta.index, delta)
        except Exception as error:
            inbox.fail(error)

    async def generate(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str | None = None
    ) -> RequestOutput:
        deltas: list[list[Delta]] = [[] for _ in range(params.n)]
        metrics = None
        async with contextlib.aclosing(self.stream(prompt, params, request_id=request_id)) as stream:
            async for delta in stream:
                deltas[delta.index].append(delta)
                metrics = delta.metrics or metrics
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(delta.text for delta in own),
                token_ids=[token for delta in own for token in delta.token_ids],
                logprobs=None if params.logprobs is None else [entry for d in own for entry in d.logprobs or ()],
                finish_reason=own[-1].finish_reason or "",
                stop_reason=own[-1].stop_reason,
            )
            for index, own in enumerate(deltas)
        ]
        assert metrics is not None
        return RequestOutput(request_id or "", None, self._check(prompt, params), outputs, metrics)

    def _check(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not prompt_ids:
            raise InvalidRequestError("The prompt is empty.", "Give at least one token.", code="empty_prompt")
        for token in (*prompt_ids, *params.logit_bias, *params.stop_token_ids):
            if not 0 <= token < self.tokenizer.vocab_size:
                raise InvalidRequestError(f"Token id {token} is outside the model's vocabulary.")
        if len(prompt_ids) >= self.max_model_len:
            raise ContextLengthError(f"The prompt has {len(prompt_ids)} tokens.", "Shorten it.")
        return prompt_ids

    @contextlib.asynccontextmanager
    async def _running(self, num_tokens: int, n: int) -> AsyncGenerator[None, None]:
        self.num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.num_waiting -= 1
        blocks = n * (1 + num_tokens // BLOCK_SIZE)
        self.num_started += 1
        self.num_running += n
        self.num_free_blocks -= blocks
        try:
            yield
        finally:
            self.num_running -= n
            self.num_free_blocks += blocks
            self._slots.release()

    def _produce(self, prompt: str, sample: int, params: SamplingParams) -> list[Delta]:
        """All deltas of one sample."""
        text = self.reply(prompt, sample)
        stop = min((s for s in params.stop if s in text), key=text.index, default=None)
        tokens = list((text if stop is None else text[: text.index(stop)]).encode())
        if stop is None:
            tokens.append(self.tokenizer.eos_id)
        tokens = [*params.forced_ids, *tokens]
        limit = min(params.max_tokens or self.max_model_len, self.max_model_len - len(prompt))
        reason = "length" if len(tokens) > limit else "stop"
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens = tokens[:limit]
        return [
            Delta(
                index=sample,
                text=decoder.decode(self.tokenizer.token_bytes(token), final=position == len(tokens) - 1),
                token_ids=[token],
                logprobs=_logprobs(token, params.logprobs),
                finish_reason=reason if position == len(tokens) - 1 else None,
                stop_reason=stop if position == len(tokens) - 1 else None,
            )
            for position, token in enumerate(tokens)
        ]


def _last_of(outputs: list[list[Delta]]) -> int:
    longest = max(map(len, outputs))
    return max(sample for sample, deltas in enumerate(outputs) if len(deltas) == longest)


def _with_metrics(delta: Delta, num_prompt: int, num_output: int) -> Delta:
    metrics = RequestMetrics(
        ttft=0.01,
        tpot=0.002,
        queue_time=0.001,
        total_time=0.5,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_prompt // BLOCK_SIZE * BLOCK_SIZE,
        num_output_tokens=num_output,
        num_preemptions=0,
    )
    return Delta(
        delta.index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_reason, metrics
    )


def _logprobs(token: int, num_top: int | None) -> list[TokenLogprob] | None:
    if num_top is None:
        return None
    return [TokenLogprob(token, -0.5, tuple(((token + i) % 256, -0.5 - i) for i in range(num_top)))]
