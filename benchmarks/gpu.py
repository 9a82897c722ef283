"""What the torch executor and the trainer reach on a GPU, beside what its memory and matrix units could do.

    python benchmarks/gpu.py [--model MODEL] [--device cuda]

Prints: the copy bandwidth and the bf16 matrix rate measured in the same run; prefill and decode of the reference
executor in bf16; a QAT step in bf16 with its share of the matrix rate, free to sum in any order and repeatable; and
GB/s of f32 masters through fake quantization. Medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import closing, nullcontext

import numpy as np
import torch

from headrace.compress.pipeline import Source, open_source
from headrace.compress.recipe import Recipe
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step
from headrace.executors.torch_device import repeatable, torch_device
from headrace.executors.torch_executor import TorchExecutor
from headrace.numerics.fake_quantize import fake_quantize
from headrace.train.gradients import Gradients
from headrace.train.model import GraphModel

BLOCK_SIZE, CONTEXT = 16, 512
GREEDY = SampleRow(SamplingParams(temperature=0.0), 0, 0)


def seconds(device: torch.device, call: Callable[[], object], repeats: int = 10, warmups: int = 3) -> float:
    """Median wall time of a call, the device idle before and after."""
    times = []
    for i in range(warmups + repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        if i >= warmups:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy, read and written both counted; FLOP a second of a bf16 matrix product."""
    large = device.type == "cuda"
    source = torch.empty(2**30 if large else 2**26, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(device, lambda: target.copy_(source))
    size = 8192 if large else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * size**3 / seconds(device, lambda: a @ b)


def step_of(rows: int, position: int) -> Step:
    """One sequence's next tokens, the last of them sampled."""
    context = position + rows
    return Step(
        token_ids=np.arange(rows, dtype=np.int32) % 1000,
        positions=np.arange(position, context, dtype=np.int32),
        seq_starts=np.array([0, rows], np.int32),
        context_lens=np.array([context], np.int32),
        block_tables=np.arange(-(-context // BLOCK_SIZE), dtype=np.int32)[None],
        sample_rows=np.array([rows - 1], np.int32),
        sampling=(GREEDY,),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    device = torch_device(args.device)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    copied, flops = ceilings(device)
    print(f"{title}, torch {torch.__version__}: copy {copied / 1e9:,.0f} GB/s, bf16 {flops / 1e12:,.1f} TFLOP/s")
    source = open_source(args.model)
    options = {"num_blocks": CONTEXT // BLOCK_SIZE + 1, "kv_format": "bf16", "dtype": "bfloat16", "device": args.device}
    weights = sum(2 * int(np.prod(param.shape)) for param in source.graph.params.values())
    with closing(TorchExecutor(source.graph, source.weights, **options)) as executor:
        prefill = seconds(device, lambda: executor.execute(step_of(CONTEXT, 0)))
        decode = seconds(device, lambda: executor.execute(step_of(1, CONTEXT)), repeats=30)
    print(f"reference executor, bf16: prefill of {CONTEXT} {CONTEXT / prefill:,.0f} tok/s")
    print(f"decode of one sequence {1 / decode:.1f} tok/s, {weights / decode / copied:.2%} of the copy bandwidth")
    train_figures(args, device, source, flops)


def train_figures(args: argparse.Namespace, device: torch.device, source: Source, flops: float) -> None:
    """A step's gradients as the trainer computes them, without the optimizer, and its rounding alone. The work: all
    matrices, three times."""
    schemes = Recipe(format="int4-g32").schemes(source.graph)
    model = GraphModel(source.graph, source.weights, schemes, device=args.device)
    ids = np.random.default_rng(0).integers(0, 1000, (args.batch_size, args.length))
    matrices = [model.master(name) for name in schemes]
    count = sum(matrix.numel() for matrix in matrices)
    (logits,) = source.graph.logits_params
    work = 6 * ids.size * (count + model.master(logits).numel())
    for name, context in (("any order", nullcontext()), ("repeatable", repeatable(device))):
        gradients = Gradients(model, None, compute="bf16")
        with context:
            took = seconds(device, lambda: gradients(ids))  # noqa: B023 (called in its turn)
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
        print(
            f"QAT forward and backward of {ids.size} tokens, {name}: {1e3 * took:.1f} ms, {ids.size / took:,.0f} tok/s,"
            f" {work / took / flops:.1%} of the matrix rate; {memory:.1f} GiB"
        )
    scheme = next(iter(schemes.values()))
    with torch.no_grad():
        took = seconds(device, lambda: [fake_quantize(matrix, scheme) for matrix in matrices])
    print(
        f"fake quantization of {count / 1e6:.0f} M f32 masters: {1e3 * took:.1f} ms, {4 * count / took / 1e9:.0f} GB/s"
    )


if __name__ == "__main__":
    main()
