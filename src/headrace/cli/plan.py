"""``headrace plan memory``: what of a model fits where, from its config.json alone."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.base.errors import CheckpointError, InvalidRequestError
from headrace.cli.options import memory_size, positive

if TYPE_CHECKING:
    from headrace.plan.node_memory import Placement
    from headrace.plan.parameters import ModelShape

HELP = "plan: memory, what of a model fits on which GPUs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    memory = kinds.add_parser("memory", help="weights, KV and activations on each GPU of a node")
    memory.add_argument("config", type=Path, metavar="CONFIG", help="a config.json, or a folder with one")
    memory.add_argument(
        "--format",
        action="append",
        metavar="NAME",
        help="of weights: bf16, fp8, int4-g32, … (repeatable)",
    )
    memory.add_argument("--quantize", default="linear", help="linear layers (default), or experts alone")
    memory.add_argument("--kv-format", default="bf16", help="bf16 (default), f32, fp8, int8, int4")
    where = memory.add_mutually_exclusive_group()
    where.add_argument("--gpu", default="h200", help="rtx4090, l40s, a100, h100, h200 (default), b200, mi300x, mi325x")
    where.add_argument("--memory", type=memory_size, metavar="SIZE", help="of one device, instead of a GPU's name")
    memory.add_argument("--tp", type=positive, default=8, metavar="N", help="GPUs that share each layer (default: 8)")
    memory.add_argument("--pp", type=positive, default=1, metavar="N", help="groups of layers, one after the other")
    memory.add_argument("--context", type=positive, default=32_768, metavar="N", help="tokens a sequence (32768)")
    memory.add_argument("--seqs", type=positive, default=1, metavar="N", help="sequences at a time (default: 1)")
    memory.add_argument("--batched-tokens", type=positive, default=8192, metavar="N", help="tokens of a step (8192)")
    memory.add_argument("--train", action="store_true", help="full fine-tuning, in shards over all GPUs")
    memory.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from headrace.plan.node_memory import GPUS, WEIGHT_BITS, Placement
    from headrace.plan.parameters import count_parameters

    if args.memory is None and args.gpu not in GPUS:
        raise InvalidRequestError(f"GPU {args.gpu!r} is not known.", f"Use one of {', '.join(GPUS)}, or --memory SIZE.")
    shape = count_parameters(_read(args.config))
    placement = Placement(
        quantize=args.quantize,
        kv_format=args.kv_format,
        gpu_bytes=args.memory or GPUS[args.gpu] * 10**9,
        tensor=args.tp,
        pipeline=args.pp,
        context=args.context,
        num_seqs=args.seqs,
        max_batched_tokens=args.batched_tokens,
    )
    if args.train:
        return _train(shape, placement, as_json=args.json)
    formats = args.format or [name for name in WEIGHT_BITS if name != "f32"]
    return _serve(shape, [replace(placement, format=name) for name in formats], as_json=args.json)


def _serve(shape: "ModelShape", placements: "list[Placement]", *, as_json: bool) -> int:
    from headrace.plan.node_memory import plan_node, smallest_node, weight_bytes

    rows: list[dict[str, Any]] = []
    for placement in placements:
        found = plan_node(shape, placement)
        rows.append(
            asdict(found)
            | {
                "format": placement.format,
                "model": int(sum(weight_bytes(shape, placement.format, placement.quantize).values())),
                "free": found.free,
                "fits": found.fits,
                "smallest_node": smallest_node(shape, placement),
            }
        )
    if as_json:
        print(json.dumps({"parameters": shape.total, "activated": shape.activated, "plans": rows}, indent=2))
        return 0
    first = placements[0]
    print(f"{shape.kind}: {shape.total / 1e9:.2f} B parameters, {shape.activated / 1e9:.2f} B activated")
    print(
        f"{first.tensor * first.pipeline} x {first.gpu_bytes / 1e9:g} GB (tp {first.tensor}, pp {first.pipeline}),"
        f" {100 * first.usable:.0f} % usable; {first.num_seqs} x {first.context:,} tokens of KV in {first.kv_format}"
    )
    head = ("GB, fullest GPU", "model", "weights", "KV", "step", "free", "KV tokens at most", "needs")
    cells = [head]
    for row in rows:
        sizes = [f"{row[key] / 1e9:.1f}" for key in ("model", "weights", "kv", "activations")]
        free = f"{row['free'] / 1e9:.1f}" if row["fits"] else "no"
        needs = f"{row['smallest_node']} GPU" if row["smallest_node"] else "> 32 GPU"
        cells.append((row["format"], *sizes, free, f"{row['kv_tokens']:,}", needs))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for name, *rest in cells:
        print("  ".join((name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)))))
    return 0


def _train(shape: "ModelShape", placement: "Placement", *, as_json: bool) -> int:
    from headrace.plan.node_memory import training_bytes

    shards = placement.tensor * placement.pipeline
    budget = int(placement.gpu_bytes * placement.usable)
    rows = {masters: training_bytes(shape, masters=masters, shards=shards) for masters in ("f32", "bf16")}
    if as_json:
        print(json.dumps({"parameters": shape.total, "budget": budget, "masters": rows}, indent=2))
        return 0
    print(f"{shape.kind}: {shape.total / 1e9:.2f} B parameters; AdamW on all of them in {shards} shards, GB on each")
    for masters, parts in rows.items():
        total = sum(parts.values())
        shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        fits = f"leaves {(budget - total) / 1e9:.1f} for activations" if total <= budget else "does not fit"
        print(f"masters in {masters:5} {total / 1e9:8.1f} of {budget / 1e9:.1f}: {shown}; {fits}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Give a config.json, or a folder with one.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object.", "Give a model's config.json.")
    text = values.get("text_config")
    return text if isinstance(text, dict) and "hidden_size" not in values else values
