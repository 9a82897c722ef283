"""An engine with text around it: prompts in, deltas out, one step at a time. `LLM` and `AsyncLLM` drive it."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from headrace.base.errors import ContextLengthError, HeadraceError, InvalidRequestError
from headrace.engine.engine import Engine
from headrace.engine.events import Event, FailedEvent, FinishedEvent
from headrace.engine.metrics import RequestMetrics
from headrace.engine.request import Request
from headrace.engine.sampling import SamplingParams
from headrace.llm.assembler import SampleAssembler
from headrace.llm.outputs import Delta, TokenLogprob
from headrace.text.tokenizer import Tokenizer

Prompt = str | AbstractSequence[int]
Output = tuple[str, Delta | HeadraceError]


@dataclass(slots=True)
class _Open:
    """A request that has not ended: its samples' texts, which of them go on, its metrics once the engine is done."""

    samples: list[SampleAssembler]
    unfinished: set[int]
    metrics: RequestMetrics | None = None


class Runtime:
    """Single-threaded: its owner serializes all calls except `check_prompt`, which reads nothing that changes."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._open: dict[str, _Open] = {}

    def check_prompt(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids. Thread-safe.

        Raises InvalidRequestError or ContextLengthError, saying why the prompt cannot run.
        """
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt)
        else:
            prompt_ids = list(prompt)
            for token in prompt_ids:
                if not isinstance(token, int) or isinstance(token, bool):
                    raise InvalidRequestError(f"A prompt of token ids holds {token!r}.", "Give a list of integers.")
        if not prompt_ids:
            raise InvalidRequestError("The prompt is empty.", "Give at least one token.", code="empty_prompt")
        vocab_size = self.engine.vocab_size
        for token in (*prompt_ids, *params.logit_bias, *params.stop_token_ids, *params.forced_ids):
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"Token id {token} is outside the model's vocabulary of {vocab_size}.",
                    f"Use ids from 0 to {vocab_size - 1}.",
                )
        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {len(prompt_ids)} tokens; the context window of {self.max_model_len} must also hold"
                " the output.",
                f"Shorten the prompt to {self.max_model_len - 1} tokens or less, or serve with a larger max_model_len.",
            )
        return prompt_ids

    def submit(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> None:
        """Queue a checked prompt under an id that no open request has."""
        assert request_id not in self._open, f"request id {request_id!r} is in use"
        request = Request(
            request_id=request_id,
            prompt_ids=tuple(prompt_ids),
            params=params,
            eos_ids=tuple(self.tokenizer.eos_ids),
        )
        self.engine.add(request)
        wants_logprobs = params.logprobs is not None
        samples = [SampleAssembler(self.tokenizer, i, params.stop, wants_logprobs) for i in range(params.n)]
        self._open[request_id] = _Open(samples, set(range(params.n)))

    def cancel(self, request_id: str) -> None:
        """Forget a request in any state, and free what it holds. A request that has ended is no error."""
        if self._open.pop(request_id, None) is not None:
            self.engine.cancel(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def step(self) -> list[Output]:
        """Run one step; returns what each sample gained, in the engine's order."""
        events = self.engine.step()
        ended = {(e.request_id, e.index): e for e in events if type(e) is FinishedEvent}
        outputs: list[Output] = []
        for event in events:
            output = self._take(event, ended)
            if output is not None:
                outputs.append(output)
        return outputs

    def _take(self, event: Event, ended: dict[tuple[str, int], FinishedEvent]) -> Output | None:
        request_id = event.request_id
        request = self._open.get(request_id)
        if request is None:  # ended earlier in this very batch of events, by a stop string in another sample's text
            return None
        if isinstance(event, FailedEvent):
            del self._open[request_id]
            return request_id, event.error
        index = event.index
        if index not in request.unfinished:
            return None
        sample = request.samples[index]
        end = ended.get((request_id, index)) if ended else None
        if isinstance(event, FinishedEvent):
            matched = sample.end()
            reason, stop_reason = ("stop", matched) if matched is not None else (event.reason, event.stop_reason)
            return self._finish(request_id, index, reason, stop_reason, event.metrics)
        logprob = None if event.logprob is None else TokenLogprob(event.token_id, event.logprob, event.top)
        visible = end is None or end.reason != "stop"
        matched = sample.push(event.token_id, logprob, event.weight_version, visible=visible)
        if matched is not None:
            # The engine may have ended it in this step too; then its own event is passed over, being ended already.
            done = end or self.engine.finish_sequence(request_id, index, matched)
            return self._finish(request_id, index, "stop", matched, done.metrics)
        return (request_id, sample.take()) if end is None else None

    def _finish(
        self, request_id: str, index: int, reason: str, stop_reason: str | int | None, metrics: RequestMetrics | None
    ) -> Output:
        request = self._open[request_id]
        request.unfinished.discard(index)
        request.metrics = request.metrics or metrics
        if request.unfinished:
            return request_id, request.samples[index].take(reason, stop_reason)
        assert request.metrics is not None, "the engine gives the metrics when its last sample ends"
        del self._open[request_id]
        return request_id, request.samples[index].take(reason, stop_reason, request.metrics)
