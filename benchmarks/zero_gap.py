"""The gap between a trainer's log-probabilities and the engine's, while weights change under the engine.

    python benchmarks/zero_gap.py                       # the embedded model in bf16
    python benchmarks/zero_gap.py OUT                   # a folder of `headrace quantize -o OUT`
    python benchmarks/zero_gap.py OUT --tokens 10000

Rounds of: the engine samples, the trainer computes the same tokens' log-probabilities in three ways (torch in f32 and
under bf16 autocast, and with the engine's kernels, `headrace.train.served`), a step of the optimizer changes the
weights, the running engine takes them. Prints mean and largest |Δ log-probability| of each way, and the share of
importance ratios that PPO with a clip of 0.2 would clip.
"""

import argparse
import time
from collections import defaultdict

import numpy as np
import torch

from headrace import LLM, SamplingParams
from headrace.align.corpus import texts
from headrace.compress.export import hf_named
from headrace.compress.pipeline import open_source
from headrace.llm.config import LLMConfig
from headrace.numerics.row_blocks import row_blocks
from headrace.numerics.schemes import IntegerScheme
from headrace.train.model import GraphModel
from headrace.train.served import ServedLogprobs

ROUND = 16  # sequences
LENGTH = 64  # output tokens of each


def schemes_of(weights):
    """Of a folder's int4 and int8 matrices: the symmetric ones that training rounds to."""
    found = {}
    for name, tensor in weights.items():
        layout = row_blocks(tensor.format.name)
        if layout is not None:
            found[name] = IntegerScheme(bits=layout.bits, group_size=layout.group_size, scale=layout.scale)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=10_000)
    args = parser.parse_args()
    options = {"max_num_seqs": ROUND} | ({} if args.model else {"weight_format": "bf16"})
    source = open_source(args.model)
    openings = [source.tokenizer.encode(text[:200])[:8] for text in texts("held_out")]
    with LLM(args.model, **options) as llm:
        model = GraphModel(source.graph, llm.model.weights, schemes_of(llm.model.weights))
        served = ServedLogprobs(model, llm.model, LLMConfig.of(options), max_len=LENGTH + 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        gaps: dict[str, list[np.ndarray]] = defaultdict(list)
        count, began = 0, time.perf_counter()
        while count < args.tokens:
            params = SamplingParams(max_tokens=LENGTH, temperature=1.0, ignore_eos=True, logprobs=0, seed=count)
            at = count // LENGTH
            prompts = [openings[(at + i) % len(openings)] for i in range(ROUND)]
            results = llm.generate(prompts, params, use_tqdm=False)
            every = [[*result.prompt_token_ids, *result.outputs[0].token_ids] for result in results]
            for result, ids in zip(results, every, strict=True):
                assert set(result.outputs[0].weight_versions) == {llm.weight_version}
                said = np.array([entry.logprob for entry in result.outputs[0].logprobs or ()], np.float32)
                gaps["engine's kernels"].append(served.values(ids)[-LENGTH:] - said)
            said = np.array([[entry.logprob for entry in r.outputs[0].logprobs or ()] for r in results], np.float32)
            ids = torch.tensor(every)
            for way, autocast in (("torch, f32", False), ("torch, bf16 autocast", True)):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(ids).reshape(*ids.shape, -1)[:, -LENGTH - 1 : -1]
                own = logits.float().log_softmax(-1).gather(2, ids[:, -LENGTH:, None])[..., 0]
                gaps[way].append((own.numpy() - said).reshape(-1))
            loss = -served(every[0])[-LENGTH:].mean()
            count += said.size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            served.refresh()
            llm.update_weights(hf_named(source.spec, model.weights()), running="recompute")
            print(f"{count} tokens, version {llm.weight_version}, {time.perf_counter() - began:.0f} s", flush=True)
        served.close()
    print(f"\n{count} tokens, {llm.weight_version} versions of the weights")
    for way, parts in gaps.items():
        gap = np.concatenate(parts).astype(np.float64)
        clipped = np.mean(np.abs(np.exp(gap) - 1) > 0.2)
        print(f"{way:22} mean |Δ| {np.abs(gap).mean():.3g}  max {np.abs(gap).max():.3g}  clipped {100 * clipped:.2f} %")


if __name__ == "__main__":
    main()
