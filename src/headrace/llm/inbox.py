"""Between the engine's pace and a reader's: deltas that wait to be read are merged, not queued."""

import asyncio

from headrace.llm.outputs import Delta

_MERGE_AT = 32


class Inbox:
    """Deltas of some requests that one reader waits for, by choice. The engine puts, the reader takes; one event loop.

    However slowly it is read, what waits is one text per choice, a list of its logprobs where they were asked, and
    fewer than 32 deltas that are not merged yet: memory is bounded by the requests' own ``max_tokens``.
    """

    def __init__(self, num_requests: int) -> None:
        self._pending: dict[int, list[Delta]] = {}
        self._num_open = num_requests
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, choice: int, delta: Delta) -> None:
        """Add what a choice gained. A request's last delta, which has its metrics, ends it."""
        waiting = self._pending.get(choice)
        if waiting is None:
            self._pending[choice] = [delta]
        else:
            waiting.append(delta)
            if len(waiting) >= _MERGE_AT:
                self._pending[choice] = [merge(waiting)]
        if delta.metrics is not None:
            self._num_open -= 1
        self._wake()

    def fail(self, error: Exception) -> None:
        """End everything with an error, which `take` raises once what came before it is taken."""
        self._error = self._error or error
        self._wake()

    @property
    def has_ended(self) -> bool:
        """Whether every request has put its last delta."""
        return not self._num_open

    async def take(self) -> dict[int, Delta]:
        """Wait for something to read: everything that waits, one delta per choice; empty after the last.

        Raises the error of `fail`.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                return {}
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pending, self._pending = self._pending, {}
        return {choice: deltas[0] if len(deltas) == 1 else merge(deltas) for choice, deltas in pending.items()}

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(deltas: list[Delta]) -> Delta:
    """Consecutive deltas of one choice as one."""
    last = deltas[-1]
    asked = any(delta.logprobs is not None for delta in deltas)
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs or ()] if asked else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        metrics=last.metrics,
        weight_versions=[version for delta in deltas for version in delta.weight_versions],
    )
