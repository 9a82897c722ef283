"""Do we read what other tools quantize? A tiny random llama, quantized by the tool, saved by it, and read by headrace.

    python benchmarks/foreign_makers.py --maker llm-compressor --python VENV/bin/python

The tool runs in an environment of its own, in a process of its own. It saves the checkpoint, and the logits of its own
model over some token ids, weights rounded and activations not. Prints, per format, how far ours (torch executor, f32)
are from them, relative to the largest logit, and in which number formats the matrices were read.
"""

import argparse
import shutil
import subprocess
import tempfile
import traceback
from collections import Counter
from pathlib import Path

FORMATS = {
    "llm-compressor": ("W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16"),
    "modelopt": ("FP8_DEFAULT_CFG",),  # its NVFP4 asks for a CUDA device
}
TOKENS = list(range(5, 45))


def tiny_llama(folder: Path):
    """Of a folder, since some tools want to look at one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.08,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def llm_compressor(model, scheme: str, out: Path) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, processor=object())  # it wants one, and has no use for it without a data set
    for module in model.modules():  # as weights alone are read, activations are not to be rounded either
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    save_logits(model, out)
    model.save_pretrained(out, save_compressed=True)


def modelopt(model, name: str, out: Path) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    mtq.quantize(model, getattr(mtq, name), calibrate)
    mtq.disable_quantizer(model, "*input_quantizer")
    save_logits(model, out)
    mtq.enable_quantizer(model, "*input_quantizer")
    with torch.inference_mode():
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out)


def calibrate(model) -> None:
    import torch

    with torch.inference_mode():
        for start in range(8):
            model(torch.arange(start, 320, 8)[None])


def save_logits(model, out: Path) -> None:
    import numpy as np
    import torch

    with torch.inference_mode():
        np.save(out / "logits.npy", model(torch.tensor([TOKENS])).logits[0].float().numpy())


def compare(maker: str, python: Path) -> None:
    import numpy as np

    from headrace.align.forced import forced_logits
    from headrace.executors.torch_executor import TorchExecutor
    from headrace.formats.checkpoint import open_checkpoint
    from headrace.formats.weights import load_weights
    from headrace.models import build_graph, load_spec, sources

    with tempfile.TemporaryDirectory() as made:
        subprocess.run([python, __file__, "--maker", maker, "--out", made], check=True, stdout=subprocess.DEVNULL)
        for folder in (Path(made) / name for name in FORMATS[maker]):
            if not (folder / "logits.npy").exists():
                print(f"{folder.name}: the tool failed, see above")
                continue
            expected = np.load(folder / "logits.npy")
            checkpoint = open_checkpoint(folder)
            spec = load_spec(checkpoint.config, "hf")
            graph = build_graph(spec)
            weights = load_weights(checkpoint, graph.params, sources(spec, "hf"))
            executor = TorchExecutor(graph, weights, num_blocks=8, block_size=16, kv_format="f32")
            found = forced_logits(executor, graph.output, TOKENS)
            formats = Counter(weights[each].format.name for each in graph.linear_matrices)
            off = np.abs(found - expected).max() / np.abs(expected).max()
            print(f"{folder.name}: {off:.1e} off; {dict(formats)}", flush=True)


def make(maker: str, out: Path) -> None:
    """What the tool's process does."""
    for name in FORMATS[maker]:
        (out / name).mkdir()
        try:
            {"llm-compressor": llm_compressor, "modelopt": modelopt}[maker](
                tiny_llama(out / "source"), name, out / name
            )
        except Exception:  # of whatever kind the tool's are: the next format may do
            traceback.print_exc()
            shutil.rmtree(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maker", choices=FORMATS, required=True)
    parser.add_argument("--python", type=Path, help="of the environment that has the tool")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is None:
        compare(args.maker, args.python)
    else:
        make(args.maker, args.out)


if __name__ == "__main__":
    main()
