"""Somebody else's trainer, our rounding rule: a Hugging Face model learns under int4, is packed, and is served.

    python examples/fake_quantize_on_transformers.py

`fake_quantize` parametrizes the linear layers of any torch module, so a plain loop, TRL's trainers and FSDP2 go on as
before. The task is a cipher alphabet: each letter says which one follows. What the trained model sees of its weights,
what the packed folder holds and what the engine multiplies with are the same numbers, bit for bit.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace import LLM, SamplingParams
from headrace.compress.gate import Thresholds
from headrace.compress.pipeline import Judging, quantize_model
from headrace.compress.recipe import Recipe
from headrace.numerics.schemes import scheme_named
from headrace.train import fake_quantize, masters

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
STRIDE = 7  # in the alphabet, from a letter to the next
FORMAT = "int4-g32"


def main() -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rounded = fake_quantize(model, scheme_named(FORMAT))
    train(model, torch.tensor([tokenizer.encode(text) for text in cipher_texts()]))

    with tempfile.TemporaryDirectory() as folder:
        trained, packed = Path(folder) / "trained", Path(folder) / "packed"
        model.save_pretrained(trained, state_dict=masters(model))
        tokenizer.save_pretrained(trained)
        anything = Thresholds(kl=None, flips=None, perplexity=None)
        judging = Judging(length=32, calibration_texts=2, held_out_texts=2, thresholds=anything)
        card = quantize_model(
            str(trained), packed, Recipe(format=FORMAT, method="rtn"), judging, command=[], progress=lambda name: None
        )
        print(f"packed {len(rounded)} matrices at {card.bits_per_weight:.2f} bits a weight")
        with LLM(str(packed)) as llm:
            check_bits(model, llm.model)
            answer = llm.generate("ahov", SamplingParams(max_tokens=22, temperature=0.0)).pop().outputs[0].text
        print(f"served in int4: ahov -> {answer}")
        assert "ahov" + answer == "".join(ALPHABET[STRIDE * i % 26] for i in range(26)), "each letter once"


def train(model, ids):
    """A loop that knows nothing of rounding."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"trained: loss {loss.item():.3f}")


def check_bits(model, served):
    """What training saw of each matrix is what is served."""
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in (
            ("self_attn.q_proj", "attn.q"),
            ("self_attn.o_proj", "attn.o"),
            ("mlp.down_proj", "mlp.down"),
        ):
            seen = model.get_submodule(f"model.layers.{layer}.{theirs}").weight.detach().numpy()
            stored = served.weights[f"layers.{layer}.{ours}.weight"].to_f32()
            assert np.array_equal(seen.view(np.uint32), stored.view(np.uint32)), f"layer {layer}: {ours}"
    print("what training saw is what is served: the same bits")


def cipher_texts():
    """The alphabet in the cipher's order, from each letter on."""
    return ["".join(ALPHABET[(start + STRIDE * i) % 26] for i in range(26)) for start in range(26)]


def byte_tokenizer():
    """A token for each byte."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine)


if __name__ == "__main__":
    main()
