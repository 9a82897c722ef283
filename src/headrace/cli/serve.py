"""``headrace serve``: an OpenAI-compatible server."""

import argparse
from pathlib import Path

from headrace.cli.options import add_model_arguments, llm_arguments, memory_size, positive

HELP = "serve a model over the OpenAI API"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="port to bind; 0 picks a free one (default: 8000)")
    group.add_argument("--api-key", help="require this bearer token")
    group.add_argument("--served-model-name", metavar="NAME", help="name in the API (default: the model's)")
    group.add_argument(
        "--max-queue", type=positive, default=1024, metavar="N", help="waiting sequences before 429 (default: 1024)"
    )
    group.add_argument(
        "--max-body", type=memory_size, default=8 << 20, metavar="SIZE", help="largest request body (default: 8MiB)"
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="allow this web origin (repeatable)"
    )
    group.add_argument(
        "--weight-updates", type=Path, metavar="DIR", help="take new weights from below this folder (POST /v1/weights)"
    )
    group.add_argument("--no-access-log", action="store_true", help="no line per request")


def run(args: argparse.Namespace) -> int:
    from headrace.serve.server import ServerConfig, reserve_port, serve

    config = ServerConfig(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        max_queue=args.max_queue,
        max_body_bytes=args.max_body,
        cors_origins=tuple(args.cors_origin),
        access_log=not args.no_access_log,
        weight_updates=args.weight_updates,
    )
    with reserve_port(config.host, config.port) as listener:  # before the model: a taken port is known at once
        from headrace.llm.async_llm import AsyncLLM

        llm = AsyncLLM(**llm_arguments(args), served_model_name=args.served_model_name)
        print(llm.describe(), flush=True)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"ready: http://{shown}:{port}/v1  (Ctrl-C stops)", flush=True)
        serve(llm, config, listener)
    return 0
