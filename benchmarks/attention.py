"""Time attention as a step has it (keys and values written, scores, sums, joins and the barriers between).

    python benchmarks/attention.py [--isa NAME] [--threads N] [--kv-format bf16,int8] [--only decode|prefill]
                                   [--rounds N] [--shape NAME]

Decode: one row for each of some sequences, 8,192 cached tokens in all; GB/s of cached keys and values, beside what
plain reads of as many bytes reach, over enough layers that each finds its cache beyond L2. Prefill: one prompt; GFLOP/s
of the pairs that causal attention needs. Formats take turns within each round; a time is the median of the rounds', and
beside it stands how many times as fast as the first format that is, the median of the rounds' ratios and their range.
With one thread the time is what the processor gave it: on a busy machine the figures to trust.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np

from headrace import _native
from headrace.executors.kv_layout import kv_bytes_per_block
from headrace.graph.ir import KVLayer

# name, query heads, KV heads, head_dim
SHAPES = [("smollm2-135m", 9, 3, 64), ("llama-3.2-1b", 32, 8, 64), ("qwen3-0.6b", 16, 8, 128)]
DECODE = [(64, 128), (16, 512), (4, 2048), (1, 8192)]  # sequences, context
PREFILL = [512, 2048]
BLOCK_SIZE, VOCAB, WORKING_SET = 16, 256, 64 << 20
NO_SAMPLING = (
    *(np.zeros((0, n), t) for n, t in ((6, np.float64), (4, np.int64))),
    *(np.zeros(n, t) for n, t in ((0, np.int32), (1, np.int64), (0, np.float64), (0, np.int32), (0, np.float32))),
    *(np.zeros((0, 0), t) for t in (np.int32, np.float32)),
    np.zeros(0, np.int32),
)


@dataclass
class Bench:
    """Plans of nothing but attention layers over one cache of `tokens` tokens, and the tables of its sequences."""

    shape: tuple[str, int, int, int]
    kv_format: str
    isa: str
    threads: int
    tokens: int
    layers: int

    def __post_init__(self) -> None:
        _, heads, kv_heads, dim = self.shape
        num_blocks = self.tokens // BLOCK_SIZE
        self.runtime = _native.Runtime(
            num_threads=self.threads,
            isa=self.isa,
            activation="f32",
            max_tokens=self.tokens,
            max_sampled=max(64, self.tokens // 128),
            max_positions=self.tokens,
            vocab_size=VOCAB,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            kv_format=self.kv_format,
        )
        self.runtime.reserve_kv([(kv_heads, dim)] * self.layers)
        features = (heads + 2 * kv_heads) * dim
        self.values = np.random.default_rng(0).standard_normal((VOCAB, features), dtype=np.float32)
        self.table = self.runtime.add_table("f32", self.values.view(np.uint8), features)
        self.blocks = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)
        self.plan, self.fill = self._plan(window=0), self._plan(window=1)

    def _plan(self, window: int) -> _native.Plan:
        _, heads, kv_heads, dim = self.shape
        width, split = (heads + 2 * kv_heads) * dim, 4 * self.tokens * (heads + 2 * kv_heads) * dim
        end = split + 4 * self.tokens * heads * dim
        self.runtime.reserve_arena(end)

        def columns(start: int, size: int) -> _native.View:
            return _native.View(begin=0, end=split, ld=width, column=start, features=size, sampled=False)

        plan, q, k = _native.Plan(self.runtime), heads * dim, kv_heads * dim
        plan.embed(self.table, 1.0, columns(0, width))
        out = _native.View(begin=split, end=end, ld=q, column=0, features=q, sampled=False)
        for layer in range(self.layers):
            queries, keys, values = columns(0, q), columns(q, k), columns(q + k, k)
            plan.attention(queries, -1, keys, -1, values, out, layer, heads, kv_heads, dim, window, dim**-0.5)
        return plan

    def run(self, plan: _native.Plan, sequences: int, rows: int, context: int) -> None:
        """The last `rows` positions of each of some sequences of `context` tokens."""
        count = sequences * rows
        plan.replay(
            np.arange(count, dtype=np.int32) * 7 % VOCAB,
            np.tile(np.arange(context - rows, context, dtype=np.int32), sequences),
            np.arange(0, count + 1, rows, dtype=np.int32),
            np.full(sequences, context, np.int32),
            self.blocks[: sequences * context // BLOCK_SIZE].reshape(sequences, -1),
            np.zeros(0, np.int32),
            *NO_SAMPLING,
            False,
        )

    def seconds_per_layer(self, sequences: int, rows: int, context: int) -> float:
        """Of one run."""
        clock = time.thread_time if self.threads == 1 else time.perf_counter
        start = clock()
        self.run(self.plan, sequences, rows, context)
        return (clock() - start) / self.layers


def in_turn(benches: list[Bench], rounds: int, sequences: int, rows: int, context: int) -> np.ndarray:
    """Seconds per layer ``[rounds, benches]``, after one run of each that does not count."""
    for bench in benches:
        bench.run(bench.fill, sequences, context, context)
        bench.run(bench.plan, sequences, rows, context)
    return np.array([[bench.seconds_per_layer(sequences, rows, context) for bench in benches] for _ in range(rounds)])


def report(benches: list[Bench], seconds: np.ndarray, what: str, unit: str, amounts: list[float]) -> None:
    """A line for each format: the time, `amounts` per second in `unit`, and the speed against the first's."""
    for i, (bench, amount) in enumerate(zip(benches, amounts, strict=True)):
        ratios, middle = seconds[:, 0] / seconds[:, i], np.median(seconds[:, i])
        faster = f"{np.median(ratios):>5.2f} x ({ratios.min():.2f} to {ratios.max():.2f})"
        print(
            f"{bench.shape[0]:>14} {bench.kv_format:>5} {what:<20} {middle * 1e6:>11.1f} us "
            f"{amount / middle / 1e9:>7.1f} {unit}  {faster}",
            flush=True,
        )


def decode(shape: tuple[str, int, int, int], kv_formats: list[str], isa: str, threads: int, rounds: int) -> None:
    _, _, kv_heads, dim = shape
    tokens = max(sequences * context for sequences, context in DECODE)
    layer = [KVLayer(kv_heads, dim)]
    sizes = [tokens // BLOCK_SIZE * kv_bytes_per_block(layer, BLOCK_SIZE, name) for name in kv_formats]
    benches = [
        Bench(shape, name, isa, threads, tokens, max(1, WORKING_SET // size))
        for name, size in zip(kv_formats, sizes, strict=True)
    ]
    for bench, size in zip(benches, sizes, strict=True):
        limit = _native.read_bandwidth(bench.layers * size, threads) / 1e9
        print(f"{shape[0]:>14} {bench.kv_format:>5} plain reads of {bench.layers * size >> 20} MiB {limit:>7.1f} GB/s")
    for sequences, context in DECODE:
        seconds = in_turn(benches, rounds, sequences, 1, context)
        report(benches, seconds, f"decode {sequences:>3} x {context:>5}", "GB/s", [float(size) for size in sizes])


def prefill(shape: tuple[str, int, int, int], kv_formats: list[str], isa: str, threads: int, rounds: int) -> None:
    _, heads, _, dim = shape
    benches = [Bench(shape, name, isa, threads, max(PREFILL), 1) for name in kv_formats]
    for context in PREFILL:
        seconds = in_turn(benches, rounds, 1, context, context)
        flops = 4.0 * heads * dim * context * (context + 1) // 2
        report(benches, seconds, f"prefill {context:>9}", "GFLOP/s", [flops] * len(benches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=_native.available_isas()[-1], choices=_native.available_isas())
    parser.add_argument("--threads", type=int, default=_native.available_cores())
    parser.add_argument("--kv-format", default="bf16", help="formats, separated by commas")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--shape", choices=[shape[0] for shape in SHAPES], help="one of the shapes alone")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{arguments.isa}, {arguments.threads} threads, {arguments.rounds} rounds")
    for shape in SHAPES:
        for kind, measure in (("decode", decode), ("prefill", prefill)):
            if arguments.only in (None, kind) and arguments.shape in (None, shape[0]):
                measure(shape, arguments.kv_format.split(","), arguments.isa, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
