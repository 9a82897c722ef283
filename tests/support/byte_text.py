"""A tokenizer whose tokens are bytes, and an executor that recites a text: `llm` tests without weights."""

from collections.abc import Callable

import numpy as np

from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.step import Step, StepResult
from headrace.llm.runtime import Runtime
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
        tokens = [self.script[i] if i < len(self.script) else EOS for i in offsets]
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


def reciting_runtime(script: str | bytes, prompt_len: int = 2, **reciter: Callable[[Step], None]) -> Runtime:
    """A runtime over a `Reciter`."""
    data = script.encode() if isinstance(script, str) else script
    engine = Engine(Reciter(data, prompt_len, **reciter), EngineConfig(max_model_len=128, max_num_seqs=8))
    return Runtime(engine, byte_tokenizer(), 128)
