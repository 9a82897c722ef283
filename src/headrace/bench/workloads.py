"""What is measured: seeded prompts and exact output lengths, the same tokens for every run, repeat and system."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.graph.cost import SequenceWork, Workload

TOKEN_RANGE = (1_000, 40_000)
"""Ids to draw from where the vocabulary has them: clear of the special tokens that most vocabularies begin with."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are submitted together.

    Attributes:
        prompts: token ids of each.
        lengths: tokens that each must produce, exactly.
    """

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.lengths), "one output length per prompt"

    @property
    def num_output_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens, prompt and output together, of the longest request: the context window that the batch needs."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths, strict=True))

    def with_lengths(self, length: int) -> "Batch":
        """The same prompts, each with `length` output tokens."""
        return Batch(self.prompts, (length,) * len(self.prompts))


def uniform(count: int, prompt_len: int, output_len: int, vocab_size: int, seed: int = 0) -> Batch:
    """`count` prompts of one length, all different, each continued by as many tokens."""
    draw = random.Random(f"{seed}-{count}-{prompt_len}")
    prompts = tuple(_tokens(draw, prompt_len, vocab_size) for _ in range(count))
    return Batch(prompts, (output_len,) * count)


def mixed(
    count: int,
    vocab_size: int,
    *,
    prompt_lens: tuple[int, int] = (16, 512),
    output_lens: tuple[int, int] = (16, 256),
    seed: int = 0,
) -> Batch:
    """`count` requests whose prompt and output lengths are drawn evenly from inclusive ranges."""
    draw = random.Random(f"mixed-{seed}-{count}")
    prompts = tuple(_tokens(draw, draw.randint(*prompt_lens), vocab_size) for _ in range(count))
    return Batch(prompts, tuple(draw.randint(*output_lens) for _ in range(count)))


def shared_prefix(count: int, prefix_len: int, own_len: int, output_len: int, vocab_size: int, seed: int = 0) -> Batch:
    """`count` prompts that begin with the same `prefix_len` tokens, as under one system prompt, and then differ.

    The prefix is the same for every seed; what follows it is not.
    """
    prefix = _tokens(random.Random(f"prefix-{prefix_len}"), prefix_len, vocab_size)
    draw = random.Random(f"shared-{seed}-{count}-{own_len}")
    prompts = tuple(prefix + _tokens(draw, own_len, vocab_size) for _ in range(count))
    return Batch(prompts, (output_len,) * count)


def least_steps(batch: Batch, max_batched_tokens: int, cached: int = 0) -> list[tuple[int, Workload]]:
    """The steps that a perfect schedule takes, as (how often, what): the base of a limit for any batch.

    All prompts are computed first, in full steps; then every step decodes one token of each sequence that goes on, at
    the mean context of its span. Steps between two sequences' ends are alike but for context, and so are one entry.
    The first `cached` tokens of each prompt are in the prefix cache.
    """
    return _prefill_steps(batch.prompts, max_batched_tokens, cached) + _decode_steps(batch)


def _prefill_steps(
    prompts: Sequence[Sequence[int]], max_batched_tokens: int, cached: int
) -> list[tuple[int, Workload]]:
    steps: list[tuple[int, Workload]] = []
    work: list[SequenceWork] = []
    room, ending = max_batched_tokens, 0

    def close_step() -> None:
        if work:
            steps.append((1, Workload(sequences=tuple(work), sampled_rows=max(1, ending))))

    for prompt in prompts:
        done = min(cached, len(prompt) - 1)  # the last token is always computed: its logits are wanted
        while done < len(prompt):
            if not room:
                close_step()
                work, room, ending = [], max_batched_tokens, 0
            part = min(room, len(prompt) - done)
            done, room = done + part, room - part
            work.append(SequenceWork(new_tokens=part, context_len=done))
            ending += done == len(prompt)
    close_step()
    return steps


def _decode_steps(batch: Batch) -> list[tuple[int, Workload]]:
    steps: list[tuple[int, Workload]] = []
    done = 1  # the prefill gives each sequence its first token
    for end in sorted({length for length in batch.lengths if length > 1}):
        middle = (done + end) // 2
        alive = [len(p) for p, length in zip(batch.prompts, batch.lengths, strict=True) if length >= end]
        sequences = tuple(SequenceWork(new_tokens=1, context_len=length + middle) for length in alive)
        steps.append((end - done, Workload(sequences=sequences, sampled_rows=len(sequences))))
        done = end
    return steps


def _tokens(draw: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    low, high = min(TOKEN_RANGE[0], vocab_size // 2), min(TOKEN_RANGE[1], vocab_size)
    return tuple(draw.randrange(low, high) for _ in range(count))
