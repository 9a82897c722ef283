"""A tokenizer whose tokens are bytes, and executors that recite or count: `llm` tests without weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.step import Step, StepResult
from headrace.llm.loader import LoadedModel
from headrace.llm.memory import MemoryPlan
from headrace.llm.runtime import Runtime
from headrace.llm.text_side import TextSide
from headrace.text.chat_template import ChatTemplate
from headrace.text.tokenizer import Tokenizer

EOS = 256
NUM_BLOCKS = 64


def byte_tokenizer() -> Tokenizer:
    """Token b is the byte b; token 256 ends a text."""
    alphabet = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
    spare = iter(range(256, 512))
    tokens = [char if char is not None else chr(next(spare)) for char in alphabet]
    return Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*tokens, "<|end|>"],
            "tokenizer.ggml.token_type": [1] * 256 + [3],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": EOS,
            "tokenizer.ggml.add_bos_token": False,
        }
    )


class Reciter:
    """An executor that continues every prompt of `prompt_len` tokens with `script`, then with end-of-sequence."""

    block_size, num_blocks, vocab_size = 4, NUM_BLOCKS, 257

    def __init__(self, script: bytes, prompt_len: int, before_step: Callable[[Step], None] = lambda step: None) -> None:
        self.script, self.prompt_len, self.before_step = script, prompt_len, before_step

    def execute(self, step: Step) -> StepResult:
        self.before_step(step)
        offsets = step.positions[step.sample_rows] - (self.prompt_len - 1)
        return self._result(step, [self.script[i] if i < len(self.script) else EOS for i in offsets])

    def _result(self, step: Step, tokens: list[int]) -> StepResult:
        num_top = max((row.params.logprobs or 0 for row in step.sampling), default=0)
        top = np.tile(np.arange(num_top, dtype=np.int32), (len(tokens), 1))
        return StepResult(
            np.array(tokens, np.int32),
            np.full(len(tokens), -0.5, np.float32),
            top,
            np.full(top.shape, -1.0, np.float32),
        )

    def close(self) -> None:
        """Holds nothing."""


class Counter(Reciter):
    """An executor that follows every byte with the next one: ``b"a"`` goes on with ``b"bcd…"``, without end."""

    def __init__(self, before_step: Callable[[Step], None] = lambda step: None) -> None:
        super().__init__(b"", 0, before_step)
        self.is_closed = False

    def execute(self, step: Step) -> StepResult:
        assert not self.is_closed, "a step after close()"
        self.before_step(step)
        return self._result(step, [int(token + 1) % 256 for token in step.token_ids[step.sample_rows]])

    def close(self) -> None:
        self.is_closed = True


def counting_model(before_step: Callable[[Step], None] = lambda step: None) -> LoadedModel:
    """What `load_model` might give, over a `Counter`; the chat template joins the messages' contents."""
    nothing: Any = None
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")
    return LoadedModel(
        name="counter",
        path=Path("counter.gguf"),
        spec=nothing,
        graph=nothing,
        weights=nothing,
        text=TextSide(byte_tokenizer(), lambda: template),
        executor=Counter(before_step),
        memory=MemoryPlan(NUM_BLOCKS, 1, 128, 1 << 20, 1),
    )


def reciting_runtime(script: str | bytes, prompt_len: int = 2, **reciter: Callable[[Step], None]) -> Runtime:
    """A runtime over a `Reciter`."""
    data = script.encode() if isinstance(script, str) else script
    engine = Engine(Reciter(data, prompt_len, **reciter), EngineConfig(max_model_len=128, max_num_seqs=8))
    return Runtime(engine, byte_tokenizer(), 128)
