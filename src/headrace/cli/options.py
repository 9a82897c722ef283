"""Options that several commands share, and how they become arguments of `LLM`."""

import argparse
import re
from typing import Any

from headrace.llm.config import ACTIVATIONS, KV_FORMATS

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def memory_size(text: str) -> int:
    """``512M``, ``2GiB``, ``1.5g`` or plain bytes, as bytes (powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a memory size (examples: 512M, 2GiB)")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how to run it."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what to load (default: smollm2-135m)")
    group = parser.add_argument_group("engine")
    group.add_argument("--max-model-len", type=positive, metavar="N", help="context window (default: the model's own)")
    group.add_argument("--max-num-seqs", type=positive, default=64, metavar="N", help="sequences at once (default: 64)")
    group.add_argument(
        "--max-num-batched-tokens", type=positive, default=512, metavar="N", help="tokens per step (default: 512)"
    )
    group.add_argument(
        "--max-prefill-chunk", type=positive, metavar="N", help="tokens of one prompt per step (default: no limit)"
    )
    group.add_argument(
        "--kv-cache-memory",
        type=memory_size,
        metavar="SIZE",
        help="memory for the KV cache, as 2GiB (default: at most half of what is free)",
    )
    group.add_argument("--no-prefix-caching", action="store_true", help="recompute every prompt from its start")
    group.add_argument("--executor", choices=("native", "torch"), default="native", help="what runs the steps")
    group.add_argument(
        "--activation", choices=ACTIVATIONS, default="auto", help="precision of linears' inputs (default: auto)"
    )
    group.add_argument("--kv-format", choices=KV_FORMATS, default="bf16", help="how cached keys and values are kept")
    group.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads (default: HEADRACE_THREADS, or the cores this process may use)",
    )
    group.add_argument(
        "--weight-cache",
        choices=("auto", "off"),
        default="auto",
        help="keep packed weights in ~/.cache for the next start (default: auto)",
    )


def add_text_arguments(parser: argparse._ActionsContainer) -> None:
    """What a model is fitted to and judged by."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="fit to: any of own (what the model says), chat (conversations it makes up), corpus (Python's documents), "
        "files of text or .jsonl (default: own,chat,corpus)",
    )
    parser.add_argument("--held-out", metavar="TEXT", help="judge by other texts, of kinds as for --calibration")


def text_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Judging` that `add_text_arguments` stands for."""
    given = {"calibration": args.calibration, "held_out": args.held_out}
    return {name: None if kinds is None else tuple(kinds.split(",")) for name, kinds in given.items()}


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `LLM` and `AsyncLLM` that `add_model_arguments` stands for."""
    return {
        "model": args.model,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_prefill_chunk": args.max_prefill_chunk,
        "kv_cache_memory": args.kv_cache_memory,
        "enable_prefix_caching": not args.no_prefix_caching,
        "executor": args.executor,
        "activation": args.activation,
        "kv_format": args.kv_format,
        "num_threads": args.threads,
        "weight_cache": args.weight_cache,
    }


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float, max_tokens: int | None) -> None:
    """How to choose tokens."""
    group = parser.add_argument_group("sampling")
    shown = "the rest of the context" if max_tokens is None else max_tokens
    group.add_argument("--max-tokens", type=positive, default=max_tokens, metavar="N", help=f"default: {shown}")
    group.add_argument("--temperature", type=float, default=temperature, help=f"0 is greedy (default: {temperature:g})")
    group.add_argument("--top-p", type=float, default=1.0, help="default: 1 (off)")
    group.add_argument("--top-k", type=int, default=0, help="default: 0 (off)")
    group.add_argument("--min-p", type=float, default=0.0, help="default: 0 (off)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1 (off)")
    group.add_argument("--seed", type=int, help="make the output reproducible")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `SamplingParams` that `add_sampling_arguments` stands for."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": tuple(args.stop),
    }
