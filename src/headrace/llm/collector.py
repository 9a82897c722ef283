"""The deltas of a request, put together again."""

from headrace.engine.metrics import RequestMetrics
from headrace.engine.sampling import SamplingParams
from headrace.llm.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprob


class Collector:
    """Takes a request's deltas in order and makes its `RequestOutput` of them."""

    def __init__(self, request_id: str, prompt: str | None, prompt_ids: list[int], params: SamplingParams) -> None:
        self.request_id = request_id
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._texts: list[list[str]] = [[] for _ in range(params.n)]
        self._token_ids: list[list[int]] = [[] for _ in range(params.n)]
        self._versions: list[list[int]] = [[] for _ in range(params.n)]
        self._logprobs: list[list[TokenLogprob]] | None = (
            None if params.logprobs is None else [[] for _ in range(params.n)]
        )
        self._ends: dict[int, Delta] = {}
        self._metrics: RequestMetrics | None = None

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        self._texts[delta.index].append(delta.text)
        self._token_ids[delta.index] += delta.token_ids
        self._versions[delta.index] += delta.weight_versions
        if self._logprobs is not None and delta.logprobs is not None:
            self._logprobs[delta.index] += delta.logprobs
        if delta.finish_reason is not None:
            self._ends[delta.index] = delta
        if delta.metrics is not None:
            self._metrics = delta.metrics

    @property
    def num_output_tokens(self) -> int:
        """Tokens so far, over all samples."""
        return sum(len(token_ids) for token_ids in self._token_ids)

    def result(self) -> RequestOutput:
        """The whole; all samples must have ended."""
        assert self._metrics is not None, "the last delta brings the metrics"
        outputs = [self._output(index) for index in range(len(self._texts))]
        return RequestOutput(self.request_id, self._prompt, self._prompt_ids, outputs, self._metrics)

    def _output(self, index: int) -> CompletionOutput:
        end = self._ends[index]
        assert end.finish_reason is not None, "an end has its reason"
        return CompletionOutput(
            index=index,
            text="".join(self._texts[index]),
            token_ids=self._token_ids[index],
            logprobs=None if self._logprobs is None else self._logprobs[index],
            finish_reason=end.finish_reason,
            stop_reason=end.stop_reason,
            weight_versions=self._versions[index],
        )
