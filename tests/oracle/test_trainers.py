"""The rounding rule under other people's trainers, TRL's and FSDP2's shards: what they train is packed and served."""

from contextlib import closing

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.fsdp import fully_shard

from headrace.align.forced import forced_logits
from headrace.base.errors import InvalidRequestError
from headrace.compress.gate import Thresholds
from headrace.compress.pipeline import Judging, open_source, quantize_model
from headrace.compress.recipe import Recipe
from headrace.executors.torch_executor import TorchExecutor
from headrace.numerics.schemes import IntegerScheme
from headrace.train import fake_quantize, masters
from tests.support.hf_models import make_model

IDS = list(range(5, 25))
ANYTHING = Thresholds(kl=None, flips=None, perplexity=None)


def byte_tokenizer():
    """A token for each byte, and two for the ends of texts."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", "<pad>"]
    engine = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<eos>", pad_token="<pad>")


@torch.no_grad()
def logits_of(model):
    """With the other matrices in bf16, as a quantized folder keeps them."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.endswith(".original"):
            parameter.copy_(parameter.bfloat16())
    return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def check_packed(model, folder):
    """`headrace quantize --method rtn` makes of saved masters what a model sees, in every bit, and serves it."""
    byte_tokenizer().save_pretrained(folder)
    target = folder.with_suffix(".int4")
    judging = Judging(length=16, calibration_texts=2, held_out_texts=2, thresholds=ANYTHING)
    quantize_model(str(folder), target, Recipe(method="rtn"), judging, command=[], progress=lambda name: None)
    source = open_source(str(target))
    for name, seen in (("attn.q", "self_attn.q_proj"), ("mlp.down", "mlp.down_proj")):
        weight = model.get_submodule(f"model.layers.1.{seen}").weight.detach().numpy()
        np.testing.assert_array_equal(source.weights[f"layers.1.{name}.weight"].to_f32(), weight)
    with closing(TorchExecutor(source.graph, source.weights, num_blocks=4)) as executor:
        found = forced_logits(executor, source.graph.output, IDS)
    expected = logits_of(model)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_trl_trains_what_is_packed(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # Each letter says which one follows, so there is something to learn.
    starts = np.random.default_rng(0).integers(0, 26, 64)
    texts = ["".join(chr(97 + (start + 7 * i) % 26) for i in range(24)) for start in starts]
    model = make_model("llama")
    assert len(fake_quantize(model, IntegerScheme())) == 21
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=24,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"text": texts})
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=byte_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "masters", state_dict=masters(model))
    check_packed(model, tmp_path / "masters")


def test_what_is_sharded_already_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = make_model("llama")
        fully_shard(model)
        with pytest.raises(InvalidRequestError, match=r"sharded already.*then fully_shard"):
            fake_quantize(model, IntegerScheme())
    finally:
        torch.distributed.destroy_process_group()


def losses_of(model):
    """A few steps of training on one batch, the same wherever it runs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(4):
        loss = model(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def train_shard(rank, folder):
    """One of two processes; the first keeps what was found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        model = make_model("llama")
        fake_quantize(model, IntegerScheme())
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        losses = losses_of(model)
        sharded = sum(parameter.to_local().numel() for parameter in model.parameters())
        gathered = masters(model)
        if rank == 0:
            torch.save((losses, sharded, gathered), folder / "found.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp_shards_train_what_one_process_trains(tmp_path):
    torch.multiprocessing.spawn(train_shard, (tmp_path,), nprocs=2)
    losses, sharded, gathered = torch.load(tmp_path / "found.pt")
    whole = make_model("llama")
    fake_quantize(whole, IntegerScheme())
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert total / 2 <= sharded < 0.6 * total, "each process keeps its half"
    np.testing.assert_allclose(losses, losses_of(whole), rtol=1e-5)
    plain = make_model("llama")
    plain.load_state_dict(gathered)
    plain.save_pretrained(tmp_path / "masters")
    fake_quantize(plain, IntegerScheme())
    check_packed(plain, tmp_path / "masters")
