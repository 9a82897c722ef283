"""``headrace train``: for now, ``qat``: a model that bears its quantization."""

import argparse
import sys
from pathlib import Path

from headrace.cli.options import add_text_arguments, positive, text_arguments
from headrace.cli.status import status

HELP = "train a model: qat, quantization-aware"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    qat = kinds.add_parser("qat", help="train a model to bear its quantization, and write it packed")
    qat.add_argument("model", nargs="?", metavar="MODEL", help="the model to train")
    qat.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    qat.add_argument("--format", default="int4-g32", help="as in headrace quantize (default: int4-g32)")
    qat.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="leave matching matrices")
    qat.add_argument("--logits", metavar="FORMAT", help="quantize the logits' matrix too (and a tied embedding)")
    qat.add_argument(
        "--start", default="awq+gptq", help="weights, awq, gptq or awq+gptq (default: awq+gptq): what masters begin as"
    )
    qat.add_argument("--loss", default="distill", help="distill (from the model itself) or next_token")
    qat.add_argument(
        "--data",
        metavar="TEXT",
        help="to train on: as for --calibration (default: own,chat,corpus)",
    )
    add_text_arguments(qat)
    qat.add_argument("--sequences", type=positive, default=512, metavar="N", help="to train on (default: 512)")
    qat.add_argument("--length", type=positive, default=128, metavar="N", help="tokens of each (default: 128)")
    qat.add_argument("--steps", type=positive, default=200, metavar="N")
    qat.add_argument("--batch-size", type=positive, default=8, metavar="N", help="sequences of a step (default: 8)")
    qat.add_argument("--learning-rate", type=float, default=1e-4, metavar="RATE", help="highest (default: 1e-4)")
    qat.add_argument("--compute", default="bf16", help="bf16 (default) or f32 matrix products")
    qat.add_argument("--checkpoint-every", type=positive, default=50, metavar="N", help="steps (default: 50)")
    qat.add_argument("--recompute-layers", action="store_true", help="less memory, more time")
    qat.add_argument("--device", default="cpu", help="as torch names it (default: cpu)")
    qat.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    from headrace.compress.pipeline import Judging
    from headrace.compress.recipe import Recipe
    from headrace.train.loop import TrainingConfig
    from headrace.train.qat import QatConfig, train_qat

    config = QatConfig(
        recipe=Recipe(format=args.format, ignore=tuple(args.ignore), logits=args.logits),
        training=TrainingConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            loss=args.loss,
            compute=args.compute,
            checkpoint_every=args.checkpoint_every,
        ),
        start=args.start,
        data=None if args.data is None else tuple(args.data.split(",")),
        sequences=args.sequences,
        length=args.length,
        seed=args.seed,
        checkpointed=args.recompute_layers,
    )

    def report(step: int, figures: dict[str, float]) -> None:
        line = f"step {step + 1}/{args.steps}  loss {figures['loss']:.4f}  {figures['seconds']:.1f} s"
        status()
        print(line, file=sys.stderr, flush=True)

    judging = Judging(**text_arguments(args))
    result = train_qat(args.model, args.output, config, judging, device=args.device, report=report, progress=status)
    status()
    print(f"{'':20}{'mean KL':>10}{'p99 KL':>10}{'same top 1':>12}{'perplexity':>12}")
    for title, found in (("rounded to nearest", result.nearest), ("trained", result.trained)):
        top1 = f"{100 * found.top1_agreement:.2f} %"
        print(f"{title:20}{found.kl_mean:10.4f}{found.kl_p99:10.3f}{top1:>12}{found.perplexity:12.3f}")
    print(
        f"Training closed {100 * result.gap_closed:.1f} % of the KL gap; the source's perplexity is "
        f"{result.nearest.reference_perplexity:.3f}."
    )
    print(f"wrote {args.output}")
    return 0
