"""`LLM`: a model and its engine, driven by the thread that calls it."""

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Self

from headrace.base.errors import HeadraceError, InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.llm.collector import Collector
from headrace.llm.config import LLMConfig
from headrace.llm.outputs import Delta, RequestOutput
from headrace.llm.progress import progress
from headrace.llm.runtime import Prompt
from headrace.llm.served_model import ServedModel


class LLM(ServedModel):
    """A language model for batches and streams from one process.

    Args:
        model: a ``.gguf`` file, a Hugging Face folder, a hub id, or None for the embedded SmolLM2-135M-Instruct.
        options: see `LLMConfig`.

    Several threads may use one `LLM`: whoever waits drives the engine for all. Use it as a context manager, or call
    `close`, to free its memory and threads.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        super().__init__(model, LLMConfig.of(options))
        self._lock = threading.Lock()
        self._inboxes: dict[str, deque[Delta | HeadraceError]] = {}
        self._ids = (f"request-{number}" for number in itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; results in the order of the prompts.

        Args:
            prompts: a string, a list of strings, a list of token ids, or a list of any of these.
            params: one for all, or one per prompt; default `SamplingParams()`.
            use_tqdm: show a progress bar; None: for long batches on a terminal.

        Raises:
            InvalidRequestError: before anything runs, if any prompt or its parameters cannot.
            HeadraceError: if a request fails; the others are cancelled.
        """
        batch = _as_batch(prompts)
        each = _per_prompt(params, len(batch))
        checked = [self._runtime.check_prompt(prompt, p) for prompt, p in zip(batch, each, strict=True)]
        with self._lock:
            request_ids = [self._open(ids, p) for ids, p in zip(checked, each, strict=True)]
        collected = [
            Collector(request_id, prompt if isinstance(prompt, str) else None, ids, p)
            for request_id, prompt, ids, p in zip(request_ids, batch, checked, each, strict=True)
        ]
        try:
            with progress(len(batch), use_tqdm) as advance:
                for collector in collected:
                    for delta in self._deltas(collector.request_id):
                        collector.add(delta)
                    advance(collector.num_output_tokens)
        finally:
            self._forget(request_ids)
        return [collector.result() for collector in collected]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        params: SamplingParams | None = None,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        Raises TemplateError if the model has no template or the template refuses the messages.
        """
        conversations = [messages] if not messages or isinstance(messages[0], dict) else messages
        prompts = [self.render_chat(list(c), **template_arguments) for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Continue one prompt, increment by increment. Closing the generator cancels the request."""
        params = params or SamplingParams()
        prompt_ids = self._runtime.check_prompt(prompt, params)
        return self._stream(prompt_ids, params)

    def _stream(self, prompt_ids: list[int], params: SamplingParams) -> Generator[Delta, None, None]:
        with self._lock:
            request_id = self._open(prompt_ids, params)
        try:
            yield from self._deltas(request_id)
        finally:
            self._forget([request_id])

    def close(self) -> None:
        """Free the executor's memory and threads. Idempotent."""
        with self._lock:
            self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, prompt_ids: list[int], params: SamplingParams) -> str:
        request_id = next(self._ids)
        self._runtime.submit(request_id, prompt_ids, params)
        self._inboxes[request_id] = deque()
        return request_id

    def _deltas(self, request_id: str) -> Generator[Delta, None, None]:
        """The deltas of an open request, running steps for everybody while there are none."""
        inbox = self._inboxes[request_id]
        while True:
            while not inbox:
                with self._lock:
                    if not inbox:
                        self._run_step()
            item = inbox.popleft()
            if isinstance(item, HeadraceError):
                raise item
            yield item
            if item.metrics is not None:
                return

    def _run_step(self) -> None:
        for request_id, output in self._runtime.step():
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox.append(output)

    def _forget(self, request_ids: Iterable[str]) -> None:
        with self._lock:
            for request_id in request_ids:
                self._inboxes.pop(request_id, None)
                self._runtime.cancel(request_id)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a string and a list of token ids are one."""
    if isinstance(prompts, str):
        return [prompts]
    batch = list(prompts)
    if not batch:
        return []
    if all(isinstance(item, int) for item in batch):
        return [batch]  # type: ignore[list-item]
    for item in batch:
        if not isinstance(item, str | Sequence):
            raise InvalidRequestError(f"A prompt is {item!r}.", "Give strings, or lists of token ids.")
    return batch  # type: ignore[return-value]


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each = list(params)
    if len(each) != count:
        raise InvalidRequestError(f"{len(each)} SamplingParams for {count} prompts.", "Give one, or one per prompt.")
    return each
