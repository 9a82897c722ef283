"""From one sample's tokens to its text: detokenization, stop strings, and the deltas a caller sees."""

from headrace.engine.metrics import RequestMetrics
from headrace.llm.outputs import Delta, TokenLogprob
from headrace.text.detokenizer import IncrementalDetokenizer
from headrace.text.stop import StopChecker
from headrace.text.tokenizer import Tokenizer


class SampleAssembler:
    """Tokens in, `Delta`s out, for one sample of a request.

    Text that may still turn into a stop string, and bytes of an unfinished character, are held back.
    """

    def __init__(self, tokenizer: Tokenizer, index: int, stop: tuple[str, ...], wants_logprobs: bool) -> None:
        self.index = index
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = StopChecker(stop) if stop else None
        self._wants_logprobs = wants_logprobs
        self._token_ids: list[int] = []
        self._versions: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text = ""

    def push(
        self, token_id: int, logprob: TokenLogprob | None, weight_version: int, *, visible: bool = True
    ) -> str | None:
        """Take one token, and of which weights it is; returns the stop string that it completed, if any.

        `visible` is false for a token that ended the output and is not part of its text.
        """
        self._token_ids.append(token_id)
        self._versions.append(weight_version)
        if logprob is not None:
            self._logprobs.append(logprob)
        if not visible:
            return None
        return self._emit(self._detokenizer.append(token_id))

    def end(self) -> str | None:
        """No token follows: release what was held back. Returns a stop string found in it, if any."""
        matched = self._emit(self._detokenizer.flush())
        if matched is None and self._stop is not None:
            self._text += self._stop.flush()
        return matched

    def take(
        self,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
        metrics: RequestMetrics | None = None,
    ) -> Delta:
        """What has come together since the last call."""
        logprobs = self._logprobs if self._wants_logprobs else None
        delta = Delta(
            self.index, self._text, self._token_ids, logprobs, finish_reason, stop_reason, metrics, self._versions
        )
        self._text, self._token_ids, self._logprobs, self._versions = "", [], [], []
        return delta

    def _emit(self, text: str) -> str | None:
        if self._stop is None:
            self._text += text
            return None
        emitted, matched = self._stop.feed(text)
        self._text += emitted
        return matched
