"""Time the linear kernels on the shapes of a small Llama: GB/s of packed weights, TFLOP/s, per number of rows.

    python benchmarks/linear.py [--isa NAME] [--activation f32|bf16] [--threads N] [--rows 1,8,64,512]

Each figure is the best of many runs, each of which finds its weight beyond L2: what the kernel can do, not what a busy
machine gives it.
"""

import argparse

import gguf
import numpy as np

from headrace import _native

# format, in_features, out_features: SmolLM2-135M's q/k/v, attention output, gate and up, down, and language-model head.
SHAPES = [
    ("q4_1", 576, 960),
    ("q4_1", 576, 576),
    ("q4_1", 576, 3072),
    ("q4_1", 1536, 576),
    ("q8_0", 576, 49152),
]
BEYOND_L2 = 8 << 20


def stored_weight(name: str, out: int, features: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((out, features), dtype=np.float32)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=_native.available_isas()[-1], choices=_native.available_isas())
    parser.add_argument("--activation", default="f32", choices=["f32", "int16", "bf16", "int8"])
    parser.add_argument("--threads", type=int, default=_native.available_cores())
    parser.add_argument("--rows", default="1,8,64,512", help="row counts, separated by commas")
    arguments = parser.parse_args()
    print(f"{arguments.isa}, {arguments.activation} activations, {arguments.threads} threads")
    print(f"{'weight':>20} {'rows':>5} {'kernel':>14} {'GB/s':>7} {'TFLOP/s':>8} {'run us':>9} {'prepare us':>10}")
    for name, features, out in SHAPES:
        raw = stored_weight(name, out, features)
        copies = max(1, BEYOND_L2 // raw.nbytes)
        for rows in map(int, arguments.rows.split(",")):
            x = np.random.default_rng(1).standard_normal((rows, features), dtype=np.float32)
            flops = 2 * rows * features * out
            repeats = max(3, int(1e11 / (copies * (flops + 30 * raw.nbytes))))
            t = _native.linear_benchmark(
                name, raw, x, arguments.isa, arguments.activation, arguments.threads, copies, repeats
            )
            run = t["run_seconds"]
            print(
                f"{f'{name} {features}->{out}':>20} {rows:>5} {t['kernel']:>14} {t['packed_bytes'] / run / 1e9:>7.1f} "
                f"{flops / run / 1e12:>8.3f} {run * 1e6:>9.1f} {t['prepare_seconds'] * 1e6:>10.1f}"
            )


if __name__ == "__main__":
    main()
