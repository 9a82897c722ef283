"""Do we read what other tools quantize? A tiny random llama, quantized by the tool, saved by it, and read by headrace.

    python benchmarks/foreign_makers.py --maker llm-compressor --python VENV/bin/python

The tool runs in an environment of its own, in a process of its own. It saves the checkpoint, and the logits over some
token ids of a model in f32 whose weights are as the tool itself decodes them, activations not rounded. Prints, per
format, how far ours (torch executor, f32) are from them, relative to the largest logit, and in which number formats the
matrices were read.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import traceback
from collections import Counter
from pathlib import Path

FORMATS = {
    "llm-compressor": ("W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16"),
    "modelopt": ("FP8_DEFAULT_CFG", "INT4_AWQ_CFG"),  # its NVFP4 asks for a CUDA device
    "auto-round": (
        "auto_round", "auto_round-8bit", "auto_round-gptqmodel", "auto_gptq", "auto_gptq-asym", "auto_awq",
        "auto_awq-asym",
    ),
    "gptqmodel": ("gptq", "gptq-8bit", "gptq-asym", "gptq_v2", "awq"),
}  # fmt: skip
TOKENS = list(range(5, 45))
VOCAB = 320


def tiny_llama(folder: Path):
    """Of a folder, since some tools want to look at one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.08,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer():
    """Some tools want one, and have no use for it beside token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(i): i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "0")), pad_token="0")


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
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
    from modelopt.torch.quantization.nn import TensorQuantizer

    mtq.quantize(model, getattr(mtq, name), calibrate)
    enabled = [each for each in model.modules() if isinstance(each, TensorQuantizer) and each.is_enabled]
    # The export begins with this: matrices that share inputs get their mean smoothing, and are rounded anew.
    requantize_resmooth_fused_llm_layers(model)
    mtq.disable_quantizer(model, "*input_quantizer")
    save_logits(model, out)
    for each in enabled:
        each.enable()
    with torch.inference_mode():
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out)


def auto_round(model, name: str, out: Path) -> None:
    from auto_round import AutoRound

    packing, _, kind = name.partition("-")
    options = {"asym": {"sym": False}, "8bit": {"bits": 8}}.get(kind, {})
    tuned = AutoRound(
        model, tokenizer=tokenizer(), scheme="W4A16", iters=2, dataset=texts(), nsamples=8, seqlen=VOCAB // 8,
        batch_size=1, device_map="cpu", amp=False, enable_torch_compile=False, low_cpu_mem_usage=False, **options,
    )  # fmt: skip
    rounded, _ = tuned.quantize()  # in f32 (amp=False), by the scales that are stored
    save_logits(rounded, out)
    tuned.save_quantized(str(out), format="auto_round:gptqmodel" if kind == "gptqmodel" else packing)


def gptqmodel(model, name: str, out: Path) -> None:
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # it fails where it counts one core
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    packing, _, kind = name.partition("-")
    options = {"asym": {"sym": False}, "8bit": {"bits": 8}}.get(kind, {})
    if packing == "awq":
        options, backend = {"method": "awq", "format": "gemm"}, BACKEND.AWQ_TORCH
    else:
        options, backend = {"format": packing, **options}, BACKEND.GPTQ_TORCH
    config = QuantizeConfig(**({"bits": 4, "group_size": 128, "desc_act": False} | options))
    tuned = GPTQModel.load(model.name_or_path, config, device="cpu", dtype=torch.float16)
    ids = [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts()]
    tuned.quantize(ids, batch_size=1, backend=backend)
    tuned.save(str(out))
    read = GPTQModel.load(str(out), device="cpu", backend=backend, dtype=torch.float16).model
    model.load_state_dict(read.state_dict(), strict=False)  # what it did not quantize, AWQ's norms among it
    for place, module in read.named_modules():
        if place.endswith("_proj"):
            module.scales = module.scales.float()  # its kernels would round products to f16
            decoded = decode_awq(module) if packing == "awq" else module.dequantize_weight()
            model.get_submodule(place).weight.data = decoded.T.contiguous()
    save_logits(model, out)


def decode_awq(module):
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)


def texts() -> list:
    import torch

    return [torch.arange(start, VOCAB, 8)[None] for start in range(8)]


def calibrate(model) -> None:
    import torch

    with torch.inference_mode():
        for text in texts():
            model(text)


MAKERS = {"llm-compressor": llm_compressor, "modelopt": modelopt, "auto-round": auto_round, "gptqmodel": gptqmodel}


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
        command = [python.absolute(), __file__, "--maker", maker, "--out", made]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=made)  # some leave logs where they run
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
            MAKERS[maker](tiny_llama(out / "source"), name, out / name)
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
