"""`LLM`: a model and its engine, driven by the thread that calls it."""

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from headrace.base.errors import ExecutorError, HeadraceError, InvalidRequestError
from headrace.engine.metrics import EngineSnapshot
from headrace.engine.sampling import SamplingParams
from headrace.llm.collector import Collector
from headrace.llm.config import LLMConfig
from headrace.llm.interrupts import interrupts_deferred
from headrace.llm.outputs import Delta, RequestOutput
from headrace.llm.progress import progress
from headrace.llm.refit import WeightSource, WeightUpdate
from headrace.llm.runtime import Output, Prompt
from headrace.llm.served_model import ServedModel, UpdateOptions


class LLM(ServedModel):
    """A language model for batches and streams from one process.

    Args:
        model: a ``.gguf`` file, a Hugging Face folder, a hub id, or None for the embedded SmolLM2-135M-Instruct.
        options: see `LLMConfig`.

    Several threads may use one `LLM`: whoever waits drives the engine for all. Use it as a context manager, or call
    `close`, to free its memory and threads. After a Ctrl-C it is as usable as before.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        super().__init__(model, LLMConfig.of(options))
        self._lock = threading.Lock()
        self._inboxes: dict[str, deque[Output]] = {}
        self._abandoned: deque[str] = deque()
        self._refusal: HeadraceError | None = None  # why no request can run, once that is so
        self._numbers = itertools.count()

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
        collectors = {
            (request_id := self._new_id()): Collector(request_id, prompt if isinstance(prompt, str) else None, ids, p)
            for prompt, ids, p in zip(batch, checked, each, strict=True)
        }
        inbox: deque[Output] = deque()
        try:
            with self._exclusive():
                for request_id, ids, p in zip(collectors, checked, each, strict=True):
                    self._open(request_id, ids, p, inbox)
            with progress(len(batch), use_tqdm) as advance:
                for request_id, delta in self._deltas(inbox, len(batch)):
                    collectors[request_id].add(delta)
                    if delta.metrics is not None:
                        advance(delta.metrics.num_output_tokens)
        finally:
            self._forget(collectors)
        return [collector.result() for collector in collectors.values()]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template. Otherwise like `generate`.

        Raises TemplateError if the model has no template or the template refuses the messages.
        """
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        prompts = [self.render_chat(list(c), **template_arguments) for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Continue one prompt, increment by increment. Closing the generator, from any thread, cancels the request.

        Raises InvalidRequestError or ContextLengthError at the call; other HeadraceErrors while it runs.
        """
        (params,) = _per_prompt(params, 1)
        prompt_ids = self._runtime.check_prompt(prompt, params)
        return self._stream(prompt_ids, params)

    def _stream(self, prompt_ids: list[int], params: SamplingParams) -> Generator[Delta, None, None]:
        request_id = self._new_id()
        inbox: deque[Output] = deque()
        try:
            with self._exclusive():
                self._open(request_id, prompt_ids, params, inbox)
            for _, delta in self._deltas(inbox, 1):
                yield delta
        finally:
            self._forget([request_id])

    def update_weights(self, source: WeightSource, **options: Any) -> WeightUpdate:
        """Replace all weights while requests run. Steps of other threads go on until the exchange, between two of them.

        Args:
            source: a GGUF file or Hugging Face folder of this model's shape, or the tensors of the latter by their
                names there. What is served quantized is rounded anew by its scheme.
            options: see `UpdateOptions`.

        Raises HeadraceErrors, and nothing changes, if anything is missing, unknown, misshapen or damaged, or does not
        fit in memory beside the old weights.
        """
        asked = UpdateOptions(**options)
        with self._one_update():
            self._check_open()
            staged, update = self._stage(source, asked)
            with self._exclusive():
                self._check_open()
                return self._install(staged, update, asked)

    def rollback_weights(self, *, running: str = "continue") -> WeightUpdate:
        """Go back to the weights before the last update, which must have had ``keep_previous=True``, and their version.

        `running` is that of `UpdateOptions`. Raises InvalidRequestError if there are none.
        """
        with self._one_update(), self._exclusive():
            self._check_open()
            return self._roll_back(UpdateOptions(running=running))

    def engine_snapshot(self) -> EngineSnapshot:
        """The engine's counters and gauges, between two steps."""
        with self._exclusive():
            return self._runtime.engine.snapshot()

    def close(self) -> None:
        """Free the executor's memory and threads; what still runs ends with an error. Idempotent."""
        with self._exclusive():
            self._refuse(HeadraceError("This LLM is closed.", "Make a new one.", code="closed"))
            self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The runtime for this thread alone, and no Ctrl-C in the middle of what it does."""
        with interrupts_deferred():
            try:
                with self._lock:
                    yield
            finally:
                self._cancel_abandoned()

    def _new_id(self) -> str:
        return f"request-{next(self._numbers)}"

    def _open(self, request_id: str, prompt_ids: list[int], params: SamplingParams, inbox: deque[Output]) -> None:
        self._check_open()
        self._runtime.submit(request_id, prompt_ids, params)
        self._inboxes[request_id] = inbox

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _deltas(self, inbox: deque[Output], num_requests: int) -> Iterator[tuple[str, Delta]]:
        """What comes into an inbox until its requests have ended, running steps for everybody while it is empty."""
        while num_requests:
            while not inbox:
                with self._exclusive():
                    if not inbox:
                        self._run_step()
            request_id, item = inbox.popleft()
            if isinstance(item, HeadraceError):
                raise item
            if item.metrics is not None:
                num_requests -= 1
            yield request_id, item

    def _run_step(self) -> None:
        try:
            outputs = self._runtime.step()
        except Exception as error:  # the runtime handles what it foresees; what it holds now cannot be known
            failure = ExecutorError(f"The engine stopped: {error!r}.", "Make a new LLM, and report this.")
            failure.__cause__ = error
            self._refuse(failure)
            return
        for output in outputs:
            inbox = self._inboxes.get(output[0])
            if inbox is not None:
                inbox.append(output)

    def _refuse(self, error: HeadraceError) -> None:
        """End what runs, and whatever is asked from now on, with an error."""
        self._refusal = self._refusal or error
        for request_id, inbox in self._inboxes.items():
            inbox.append((request_id, error))

    def _forget(self, request_ids: Iterable[str]) -> None:
        """Have requests cancelled: now, or by the thread that runs a step as soon as it is done.

        Waits for no lock: a stream that nobody reads any more may be closed by the garbage collector anywhere, also
        inside a step of this very thread.
        """
        self._abandoned.extend(request_ids)
        self._cancel_abandoned()

    def _cancel_abandoned(self) -> None:
        with interrupts_deferred():
            while self._abandoned and self._lock.acquire(blocking=False):
                try:
                    while self._abandoned:
                        request_id = self._abandoned.popleft()
                        self._inboxes.pop(request_id, None)
                        if self._refusal is None:
                            self._runtime.cancel(request_id)
                finally:
                    self._lock.release()


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a string and a list of token ids are one."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(f"The prompt is {prompts!r}.", "Give strings, or lists of token ids.")
    batch = list(prompts)
    if batch and all(isinstance(item, int) for item in batch):
        return [batch]  # type: ignore[list-item]
    for item in batch:
        if not isinstance(item, Sequence):
            raise InvalidRequestError(f"A prompt is {item!r}.", "Give strings, or lists of token ids.")
    return batch  # type: ignore[return-value]


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequestError(f"params is {params!r}.", "Give one SamplingParams, or a list with one per prompt.")
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} SamplingParams for {count} prompts.", "Give one, or one per prompt.")
    return list(params)
