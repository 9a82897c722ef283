"""What trainer and engine say of the same tokens, by what each of them rounds: the ablation of INT4 QAT.

    python benchmarks/ablation.py OUT.json [--device cuda] [--steps 200]    # trains and measures
    python benchmarks/ablation.py OUT.json --draw FOLDER                    # its pictures

Two copies of one model learn the next token of the same texts: one sees its matrices as they are, the other sees them
rounded to int4 in groups of 32 (quantization-aware). Now and then both are given to two engines, one that serves bf16
and one that serves int4. Each engine samples, and the trainer says what it holds the tokens' log-probabilities to be:
|Δ log-probability|, mean and 99th percentile, and the share of importance ratios outside 1 ± 0.2. What is served is
also scored on texts that nobody trained on. Matched pairs round alike; the other two are the mismatches that people
run: training for int4 and serving bf16, and serving in int4 what was never trained for it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from headrace import LLM, SamplingParams
from headrace.align.alignment import CLIP
from headrace.align.corpus import texts
from headrace.compress.export import hf_config, hf_named
from headrace.compress.pipeline import Judging, Source, open_source, windows, write_folder
from headrace.compress.recipe import Recipe
from headrace.executors.torch_device import torch_device
from headrace.llm.config import LLMConfig
from headrace.plan.host import Host
from headrace.train.data import corpus_sequences
from headrace.train.loop import TrainingConfig, train
from headrace.train.model import GraphModel
from headrace.train.qat import packed
from headrace.train.served import ServedLogprobs

FORMAT = "int4-g32"
SERVED = ("bf16", FORMAT)
PANELS = (
    ("mean", "mean |Δ log-probability|, nats"),
    ("p99", "99th percentile of |Δ log-probability|, nats"),
    ("clipped", "share of importance ratios outside 1 ± 0.2"),
    ("held_out_loss", "loss of what is served on other texts, nats"),
)
ROLLOUTS, ROLLOUT = 16, 64  # sequences that an engine samples, and output tokens of each
HELD_OUT, LENGTH = 8, 256  # texts that are scored, and tokens of each
SAMPLED = SamplingParams(max_tokens=ROLLOUT, temperature=1.0, ignore_eos=True, logprobs=0)


class Pair:
    """A trainer's model beside an engine that serves it."""

    def __init__(self, model: GraphModel, llm: LLM, source: Source) -> None:
        self.model, self.llm = model, llm
        self.scores = ServedLogprobs(model, llm.model, LLMConfig(), max_len=LENGTH)
        self._spec = source.spec
        self._openings = [source.tokenizer.encode(text[:200])[:8] for text in texts("held_out")][:ROLLOUTS]
        self._held_out = windows(
            source, Judging(length=LENGTH, held_out_texts=HELD_OUT, held_out=("corpus",)), "held_out"
        )

    def measure(self) -> dict[str, float]:
        """The gap on what the engine samples from the weights of now, and what it makes of held-out texts."""
        self.llm.update_weights(hf_named(self._spec, self.model.weights()))
        self.scores.refresh()
        results = self.llm.generate(self._openings, SAMPLED, use_tqdm=False)
        said = np.array([[entry.logprob for entry in r.outputs[0].logprobs or ()] for r in results], np.float32)
        ids = torch.tensor([[*r.prompt_token_ids, *r.outputs[0].token_ids] for r in results], device=self.model.device)
        gap = self._trainer_says(ids).astype(np.float64) - said
        served = np.concatenate([self.scores.values(text.tolist()) for text in self._held_out])
        return {
            "mean": float(np.abs(gap).mean()),
            "p99": float(np.percentile(np.abs(gap), 99)),
            "clipped": float(np.mean(np.abs(np.exp(gap) - 1) > CLIP)),
            "held_out_loss": -float(served.mean()),
        }

    def close(self) -> None:
        """Free the scoring executor; the engine is another's."""
        self.scores.close()

    @torch.no_grad()
    def _trainer_says(self, ids: torch.Tensor) -> np.ndarray:
        """In bf16, as it trains."""
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = self.model(ids).reshape(*ids.shape, -1)[:, -ROLLOUT - 1 : -1]
        return logits.float().log_softmax(-1).gather(2, ids[:, -ROLLOUT:, None])[..., 0].cpu().numpy()


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Train both models; the figures of all four pairs over the steps."""
    source = open_source(args.model)
    schemes = Recipe(format=FORMAT).schemes(source.graph)
    batches = corpus_sequences(source.tokenizer, args.sequences, args.length, seed=0).batches(args.batch_size, seed=0)
    config = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        loss="next_token",
        checkpoint_every=args.steps,
    )
    curves: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        described = hf_config(source.checkpoint, source.spec)
        write_folder(source, described, packed(source.weights, schemes), schemes, work / FORMAT, {})
        engines = {
            "bf16": stack.enter_context(LLM(args.model, weight_format="bf16", max_num_seqs=ROLLOUTS)),
            FORMAT: stack.enter_context(LLM(str(work / FORMAT), max_num_seqs=ROLLOUTS)),
        }
        for trained, rounded in (("no QAT", {}), ("QAT", schemes)):
            model = GraphModel(source.graph, source.weights, rounded, device=args.device)
            with ExitStack() as open_pairs:
                pairs = {
                    f"{trained}, served as {served}": open_pairs.enter_context(closing(Pair(model, llm, source)))
                    for served, llm in engines.items()
                }
                _train_and_look(model, batches, config, work / trained, pairs, curves, args.every)
    return curves


def _train_and_look(
    model: GraphModel,
    batches: Callable[[int], np.ndarray],
    config: TrainingConfig,
    folder: Path,
    pairs: Mapping[str, Pair],
    curves: dict[str, list[dict[str, float]]],
    every: int,
) -> None:
    began = time.perf_counter()

    def look(done: int, loss: float | None) -> None:
        for name, pair in pairs.items():
            found = {"step": done, **pair.measure()} | ({} if loss is None else {"training_loss": loss})
            curves.setdefault(name, []).append(found)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"{time.perf_counter() - began:5.0f} s  {name:26} {shown}", flush=True)

    def report(step: int, figures: dict[str, float]) -> None:
        if (step + 1) % every == 0 or step + 1 == config.steps:
            look(step + 1, figures["loss"])

    look(0, None)
    train(model, None, batches, config, folder, report=report)


def draw(path: Path, folder: Path) -> None:
    """Four panels, a line for each pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = json.loads(path.read_text())
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for panel, (key, label) in zip(panels.flat, PANELS, strict=True):
        for name, curve in kept["curves"].items():
            trained, _, served = name.partition(", served as ")
            matched = (trained == "QAT") == (served == FORMAT)
            panel.plot(
                [found["step"] for found in curve],
                [found[key] for found in curve],
                color="#2a6f97" if trained == "QAT" else "#e07a5f",
                linestyle="-" if matched else "--",
                marker="o",
                markersize=3,
                label=f"{name}{'' if matched else ' (mismatch)'}",
            )
        panel.set_xlabel("optimizer steps")
        panel.set_title(label, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        if key != "held_out_loss":
            panel.set_ylim(bottom=0)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.suptitle(f"SmolLM2-135M-Instruct, {kept['machine']}, {kept['date']}", fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "ablation.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw what was measured, measure nothing")
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu", help="of the trainer, as torch names it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=25, help="steps between two looks")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    args = parser.parse_args()
    if args.draw:
        draw(args.result, args.draw)
        return
    on = torch_device(args.device)
    machine = torch.cuda.get_device_name(on) if on.type == "cuda" else Host.here().cpu
    curves = measure(args)
    settings = {name: value for name, value in vars(args).items() if name not in ("result", "draw")}
    kept = {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": settings,
        "curves": curves,
    }
    args.result.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
