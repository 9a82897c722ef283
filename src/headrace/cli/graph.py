"""``headrace graph``: print a model's graph, or draw one layer of it."""

import argparse
from pathlib import Path

from headrace.base.errors import InvalidRequestError

HELP = "print a model's graph with shapes, FLOPs and bytes; --svg draws one layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what to show (default: smollm2-135m)")
    parser.add_argument("--unfused", action="store_true", help="before the passes that fuse q/k/v and gate/up")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw one layer into this file")
    parser.add_argument("--layer", type=int, default=0, help="which layer to draw (default: 0)")


def run(args: argparse.Namespace) -> int:
    from headrace.graph.picture import layer_svg
    from headrace.graph.show import describe
    from headrace.llm.loader import load_graph, stored_formats

    graph, weights = load_graph(args.model, fused=not args.unfused)
    if args.svg:
        try:
            args.svg.write_text(layer_svg(graph, args.layer), encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(f"Cannot write {args.svg}: {error.strerror}.", "Name a writable file.") from None
        print(f"wrote {args.svg}")
    else:
        print(describe(graph, stored_formats(graph, weights)))
    return 0
