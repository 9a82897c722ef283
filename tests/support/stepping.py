"""Driving an executor by hand, without an engine: the test chooses which tokens each sequence feeds in each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from headrace.engine.executor import Executor
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step, StepResult

GREEDY = SampleRow(SamplingParams(temperature=0.0), seed=0, index=0)


@dataclass
class Stepper:
    """Keeps the sequences of an executor and their block tables.

    Blocks are handed out in a shuffled order, so that no sequence's blocks are neighbours in the pool.
    """

    executor: Executor
    lengths: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = np.random.default_rng(0).permutation(self.executor.num_blocks).tolist()

    def run(
        self, work: Mapping[str, Sequence[int]], sampled: int | None = None, taps: tuple[str, ...] = ()
    ) -> StepResult:
        """Append tokens to sequences (new names start new ones) in one step.

        `sampled` says how many of each sequence's last tokens are sampled, greedily; None: all.
        """
        names, starts, rows = list(work), [0], []
        for name in names:
            self._grow(name, len(work[name]))
            starts.append(starts[-1] + len(work[name]))
            first = starts[-2] if sampled is None else max(starts[-2], starts[-1] - sampled)
            rows += range(first, starts[-1])
        width = max(len(self.tables[name]) for name in names)
        step = Step(
            token_ids=np.concatenate([np.asarray(work[name], np.int32) for name in names]),
            positions=np.concatenate(
                [np.arange(self.lengths[name] - len(work[name]), self.lengths[name], dtype=np.int32) for name in names]
            ),
            seq_starts=np.array(starts, np.int32),
            context_lens=np.array([self.lengths[name] for name in names], np.int32),
            block_tables=np.array(
                [self.tables[name] + [-1] * (width - len(self.tables[name])) for name in names], np.int32
            ),
            sample_rows=np.array(rows, np.int32),
            sampling=(GREEDY,) * len(rows),
            taps=taps,
        )
        return self.executor.execute(step)

    def logits(self, work: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Run a step; the logits after each of its tokens, float32 [tokens, vocabulary] for each sequence."""
        rows = self.run(work, taps=("logits",)).taps["logits"]
        ends = np.cumsum([len(tokens) for tokens in work.values()])
        return dict(zip(work, np.split(rows, ends[:-1]), strict=True))

    def greedy(self, prompts: Mapping[str, Sequence[int]], count: int) -> dict[str, list[int]]:
        """Prefill all prompts in one step, then produce `count` tokens for each, together."""
        outputs: dict[str, list[int]] = {name: [] for name in prompts}
        work = {name: list(tokens) for name, tokens in prompts.items()}
        for _ in range(count):
            chosen = self.run(work, sampled=1).token_ids.tolist()
            for name, token in zip(work, chosen, strict=True):
                outputs[name].append(token)
            work = {name: [tokens[-1]] for name, tokens in outputs.items()}
        return outputs

    def _grow(self, name: str, count: int) -> None:
        self.lengths[name] = self.lengths.get(name, 0) + count
        table = self.tables.setdefault(name, [])
        while len(table) * self.executor.block_size < self.lengths[name]:
            table.append(self._free.pop())
