"""What the server needs of the model it serves; `headrace.llm.async_llm.AsyncLLM` is one."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from headrace.engine.metrics import EngineSnapshot
from headrace.engine.sampling import SamplingParams
from headrace.llm.inbox import Inbox
from headrace.llm.outputs import RequestOutput
from headrace.llm.refit import WeightUpdate

Prompt = str | list[int]


class TokenTexts(Protocol):
    """The part of a tokenizer that responses need."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; not always valid UTF-8 on their own."""
        ...


class AsyncModel(Protocol):
    """A running model. All methods are called from the server's event loop."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def tokenizer(self) -> TokenTexts: ...

    @property
    def is_healthy(self) -> bool:
        """Whether the engine can still run steps."""
        ...

    def submit(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, request_ids: Sequence[str]
    ) -> AbstractAsyncContextManager[Inbox]:
        """Run prompts side by side, all into one inbox: sample j of prompt i is its choice ``i * n + j``. Leaving the
        context frees the requests' KV blocks at once.

        Raises:
            InvalidRequestError: on entering, when a request can never succeed; from `Inbox.take` at the latest.
        """
        ...

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> RequestOutput:
        """The finished request; cancelling the caller frees its KV blocks at once."""
        ...

    @property
    def weight_version(self) -> int:
        """Of the weights that the next step runs with."""
        ...

    async def update_weights(self, source: str, **options: Any) -> WeightUpdate:
        """Replace all weights between two steps: see `headrace.LLM.update_weights`."""
        ...

    async def rollback_weights(self, *, running: str = "continue") -> WeightUpdate:
        """Go back to the weights before the last update."""
        ...

    def render_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation as the model's template puts it, tokenized. Safe to call from a worker thread."""
        ...

    def engine_snapshot(self) -> EngineSnapshot:
        """The engine as of its last step; a new object after each step, the same one until then."""
        ...

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...
