"""A new process up to its first token, told as one line of JSON: what ``bench startup`` runs again and again.

python -m headrace.bench.first_token STARTED REQUEST: the clock reading at which this process was asked for, and JSON
with `model`, `options` (of `LLM`) and `prompt` (token ids).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(started: str, request: str) -> None:
    running = time.perf_counter()
    asked = json.loads(request)
    from headrace import LLM, SamplingParams
    from headrace.executors.native import NativeExecutor  # noqa: F401 (an import that every start on a CPU pays for)

    imported = time.perf_counter()
    with LLM(asked["model"], **asked["options"]) as llm:
        loaded = time.perf_counter()
        params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0)
        (result,) = llm.generate([asked["prompt"]], params, use_tqdm=False)
        done = time.perf_counter()
        told: dict[str, Any] = {
            "process": running - float(started),
            "import": imported - running,
            "load": loaded - imported,
            "first_token": done - loaded,
            "total": done - float(started),
            "token_ids": result.outputs[0].token_ids,
            "peak_bytes": peak_bytes(),
            "needed_bytes": needed_bytes(llm, len(asked["prompt"])),
            "parts": llm.model.seconds,
        }
    sys.stdout.write(json.dumps(told) + "\n")


def needed_bytes(llm: Any, num_tokens: int) -> int:
    """What the model cannot do without: its packed weights, and the KV blocks that `num_tokens` tokens touch."""
    memory, executor = llm.model.memory, llm.model.executor
    blocks = -(-num_tokens // executor.block_size)
    return int(executor.describe()["packed_bytes"] + blocks * memory.block_bytes)


def peak_bytes() -> int | None:
    """The most memory that this process has had, files mapped into it included (VmHWM of proc(5)).

    Not getrusage's figure: that one begins with what the parent had.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
