"""Who may join the queue."""

from headrace.engine.metrics import EngineSnapshot
from headrace.serve.errors import ApiError
from headrace.serve.model import AsyncModel

_RETRY_AFTER = {"retry-after": "1"}


class Gate:
    """Refuses what the engine cannot take now, so that a queue never grows beyond what its clients would wait for.

    The engine reports its queue once per step. Sequences admitted since the last report are counted here, so that a
    burst cannot slip in between two reports.
    """

    def __init__(self, llm: AsyncModel, max_queue: int) -> None:
        self._llm = llm
        self._max_queue = max_queue
        self._report: EngineSnapshot | None = None
        self._num_admitted = 0

    def admit(self, num_sequences: int) -> None:
        """Let a request's sequences in.

        Raises:
            ApiError: 400 if they are more than may ever wait, 503 if the engine is dead, 429 if the queue is full.
        """
        limit = self._max_queue
        if num_sequences > limit:
            cause = f"The request asks for {num_sequences} sequences (prompts times n), but at most {limit} may wait."
            raise ApiError(
                400, cause, "Split it, or start the server with a larger --max-queue.", code="too_many_prompts"
            )
        if not self._llm.is_healthy:
            cause, remedy = "The engine has stopped.", "Restart the server; its log has the cause."
            raise ApiError(503, cause, remedy, code="engine_stopped", headers=_RETRY_AFTER)
        waiting = self._num_waiting()
        if waiting + num_sequences > limit:
            cause = f"{waiting} sequences are waiting already, and at most {limit} may."
            raise ApiError(429, cause, "Try again in a moment.", code="overloaded", headers=_RETRY_AFTER)
        self._num_admitted += num_sequences

    def _num_waiting(self) -> int:
        report = self._llm.engine_snapshot()
        if report is not self._report:
            self._report, self._num_admitted = report, 0
        return report.num_waiting + self._num_admitted
