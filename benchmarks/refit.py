"""What replacing the weights of a running engine takes: bf16 masters into the formats that are served.

    python benchmarks/refit.py OUT            # a folder of `headrace quantize -o OUT`
    python benchmarks/refit.py                # the embedded model, served in bf16

One stream decodes throughout. Prints, as medians over the updates: seconds of each part, GB/s of bf16 masters through
rounding and packing (on one thread, beside the stream), the longest gap between two tokens with an update and without.
"""

import argparse
import statistics
import threading
import time

import numpy as np

from headrace import LLM, SamplingParams
from headrace.compress.export import hf_named
from headrace.llm.loader import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--idle", action="store_true", help="without a stream beside it")
    args = parser.parse_args()
    options = {"max_num_seqs": 4} | ({} if args.model else {"weight_format": "bf16"})
    source = open_model(args.model)
    masters = hf_named(source.spec, {name: tensor.in_plain("bf16") for name, tensor in source.weights.items()})
    matrices = sum(tensor.num_bytes for tensor in masters.values() if len(tensor.shape) == 2)
    with LLM(args.model, **options) as llm:
        stop, at, marks = threading.Event(), [], []

        def stream() -> None:
            while not stop.is_set():
                for _ in llm.stream("Once upon a time", SamplingParams(max_tokens=400, ignore_eos=True)):
                    at.append(time.perf_counter())
                    if stop.is_set():
                        return

        reader = threading.Thread(target=stream)
        if not args.idle:
            reader.start()
        time.sleep(1)
        updates = []
        for _ in range(args.updates):
            begin = time.perf_counter()
            updates.append(llm.update_weights(masters))
            marks.append((begin, time.perf_counter()))
            time.sleep(0.3)
        stop.set()
        if not args.idle:
            reader.join()
    parts = {part: statistics.median(update.seconds[part] for update in updates) for part in updates[0].seconds}
    made = parts["convert"] + parts["pack"]
    print("  ".join(f"{part} {1e3 * seconds:.2f} ms" for part, seconds in parts.items()))
    print(
        f"{matrices / 1e6:.0f} MB of bf16 matrices, rounded {matrices / parts['convert'] / 1e9:.2f} GB/s, "
        f"rounded and packed {matrices / made / 1e9:.2f} GB/s"
    )
    if at:
        gaps = np.diff(at)
        inside = np.array([any(begin <= t <= end for begin, end in marks) for t in at[1:]])
        for title, chosen in (("without", gaps[~inside]), ("during updates", gaps[inside])):
            print(f"between tokens, {title}: median {1e3 * np.median(chosen):.1f}, longest {1e3 * chosen.max():.1f} ms")


if __name__ == "__main__":
    main()
