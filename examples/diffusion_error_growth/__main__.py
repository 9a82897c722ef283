"""Errors of a diffusion model over its steps beside errors of a language model over its tokens: which forgives what.

python -m examples.diffusion_error_growth                     # ten to forty minutes
python -m examples.diffusion_error_growth --small             # under a minute: what CI runs
python -m examples.diffusion_error_growth --weights dit.pt    # trained once, kept, taken from there the next time
python -m examples.diffusion_error_growth --json all.json --svg growth.svg

Trains a diffusion transformer on scikit-learn's digits, rounds it and the embedded language model to the same formats,
and measures both against themselves.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from examples.diffusion_error_growth.experiment import SMALL, Size, measure_diffusion, measure_language
from examples.diffusion_error_growth.report import diffusion_table, language_table, picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cpu", help="of the diffusion model (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch: more wait more than they win here (default: 1)"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="take the diffusion model from here, or keep it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the picture")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = SMALL if args.small else Size()

    def say(what: str) -> None:
        print(f"… {what}", file=sys.stderr, flush=True)

    diffusion = measure_diffusion(size, args.device, args.weights, say)
    print(diffusion_table(diffusion), flush=True)
    language = measure_language(size, say)
    print(language_table(language), end="")
    if args.json is not None:
        args.json.write_text(
            json.dumps({"diffusion": asdict(diffusion), "language": asdict(language)}, indent=1) + "\n"
        )
    if args.svg is not None:
        args.svg.write_text(picture(diffusion, language, size.main_steps))


if __name__ == "__main__":
    main()
