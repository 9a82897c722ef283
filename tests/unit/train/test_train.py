"""Quantization-aware training of tiny models: what is trained is what is served, and a stopped run is as none."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from headrace import LLM, SamplingParams
from headrace.align.forced import forced_logits
from headrace.base.errors import CheckpointError, InvalidRequestError
from headrace.cli.main import main
from headrace.compress.export import hf_named
from headrace.compress.pipeline import Judging, open_source
from headrace.compress.recipe import Recipe
from headrace.executors.torch_executor import TorchExecutor
from headrace.train.data import Sequences, corpus_sequences, file_sequences
from headrace.train.loop import DivergedError, TrainingConfig, train
from headrace.train.model import GraphModel
from headrace.train.qat import QatConfig, packed, train_qat
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama
from tests.support.tiny_model import write_model

GRAPH = tiny_llama()
WEIGHTS = random_weights(GRAPH)
SCHEMES = Recipe(format="int4-g32").schemes(GRAPH)
BATCHES = Sequences(np.random.default_rng(0).integers(0, VOCAB, (32, 16))).batches(4, seed=0)
CONFIG = TrainingConfig(steps=12, batch_size=4, learning_rate=3e-4, compute="f32", checkpoint_every=5)


def models():
    return GraphModel(GRAPH, WEIGHTS, SCHEMES), GraphModel(GRAPH, WEIGHTS, {}).requires_grad_(False)


def test_the_forward_pass_is_what_is_served():
    model, _ = models()
    ids = BATCHES(0)
    found = model(torch.from_numpy(ids)).detach().numpy().reshape(4, 16, VOCAB)
    with closing(TorchExecutor(GRAPH, packed(model.weights(), SCHEMES), num_blocks=8)) as executor:
        for i in range(4):
            np.testing.assert_allclose(found[i], forced_logits(executor, "logits", ids[i].tolist()), atol=2e-4)
    with model.unquantized():
        assert not np.allclose(model(torch.from_numpy(ids)).detach().numpy(), found.reshape(64, VOCAB), atol=1e-2)


def test_every_master_gets_a_gradient_through_the_rounding():
    model, _ = models()
    model(torch.from_numpy(BATCHES(0))).square().mean().backward()
    for name in GRAPH.params:
        gradient = model.master(name).grad
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


def test_distillation_brings_the_rounded_model_nearer_to_its_source(tmp_path):
    model, teacher = models()
    losses = []
    train(model, teacher, BATCHES, CONFIG, tmp_path, report=lambda step, figures: losses.append(figures["loss"]))
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_next_token_training_needs_no_teacher(tmp_path):
    model, _ = models()
    losses = []
    config = TrainingConfig(**{**vars_of(CONFIG), "loss": "next_token"})
    train(model, None, lambda step: BATCHES(0), config, tmp_path, report=lambda s, f: losses.append(f["loss"]))
    assert losses[-1] < losses[0]


def vars_of(config):
    return {name: getattr(config, name) for name in config.__slots__}


def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    whole, teacher = models()
    train(whole, teacher, BATCHES, CONFIG, tmp_path / "whole")

    def stop(step, figures):
        if step == 7:
            raise KeyboardInterrupt

    model, _ = models()
    with pytest.raises(KeyboardInterrupt):
        train(model, teacher, BATCHES, CONFIG, tmp_path / "stopped", report=stop)
    resumed, _ = models()
    seen = []
    train(resumed, teacher, BATCHES, CONFIG, tmp_path / "stopped", report=lambda step, figures: seen.append(step))
    assert seen == list(range(5, 12)), "from the checkpoint on"
    for name in GRAPH.params:
        assert torch.equal(resumed.master(name), whole.master(name)), name
    curves = [(tmp_path / kind / "curve.jsonl").read_text().splitlines() for kind in ("whole", "stopped")]
    assert [json.loads(line)["loss"] for line in curves[0]] == [json.loads(line)["loss"] for line in curves[1]]


def test_another_runs_checkpoint_and_a_damaged_one_are_errors(tmp_path):
    model, teacher = models()
    train(model, teacher, BATCHES, CONFIG, tmp_path)
    other = TrainingConfig(**{**vars_of(CONFIG), "steps": 13})
    with pytest.raises(CheckpointError, match="other settings"):
        train(model, teacher, BATCHES, other, tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(model, teacher, BATCHES, CONFIG, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model, teacher = models()
    with torch.no_grad():
        model.master("layers.0.up.weight")[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="Step 0"):
        train(model, teacher, BATCHES, CONFIG, tmp_path)


def test_batches_are_functions_of_their_step_and_every_piece_comes_once():
    rows = np.arange(20)[:, None]
    batch = Sequences(rows).batches(4, seed=1)
    first = np.concatenate([batch(step) for step in range(5)]).reshape(-1)
    assert sorted(first) == list(range(20))
    np.testing.assert_array_equal(batch(3), Sequences(rows).batches(4, seed=1)(3))
    assert not np.array_equal(first, np.concatenate([batch(step) for step in range(5, 10)]).reshape(-1))
    with pytest.raises(InvalidRequestError, match="fewer than a batch"):
        Sequences(rows).batches(21, seed=0)


def test_sequences_of_documents(tmp_path):
    tokenizer = open_source(write_model(tmp_path)).tokenizer
    found, again, other = (corpus_sequences(tokenizer, 6, 16, seed).ids for seed in (3, 3, 4))
    assert found.shape == (6, 16)
    np.testing.assert_array_equal(found, again)
    assert not np.array_equal(found, other)


def test_sequences_of_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("abcdefgh" * 8)
    source = open_source(write_model(tmp_path / "model"))
    pieces = np.reshape(source.tokenizer.encode("abcdefgh" * 8), (7, 8))
    found = file_sequences(path, source.text, 7, 8, seed=0).ids
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(pieces, axis=0))
    with pytest.raises(InvalidRequestError, match=r"mine.txt has 7 pieces of 8 tokens, not 9"):
        file_sequences(path, source.text, 9, 8, seed=0)


@pytest.mark.parametrize(("start", "recipe"), [
    ("weights", Recipe()), ("awq", Recipe()), ("awq+gptq", Recipe(format="mxfp4")), ("gptq", Recipe()),
    ("awq+gptq", Recipe()), ("awq+gptq", Recipe(format="int4-g32-asym")),
])  # fmt: skip
def test_masters_begin_where_they_are_told_to(tmp_path, start, recipe):
    """Seen unrounded, they are the source, or what is rounded to; one step of nearly no length does not change that."""
    path = write_model(tmp_path)
    training = TrainingConfig(steps=1, batch_size=4, learning_rate=1e-12, compute="f32")
    config = QatConfig(recipe=recipe, training=training, start=start, data=("corpus",), sequences=4, length=32)
    judging = Judging(length=32, calibration_texts=4, held_out_texts=4)
    source = open_source(path)
    model = train_qat(path, tmp_path / "out", config, judging, report=lambda step, figures: None).model
    ids = torch.arange(32)[None] % VOCAB
    with torch.no_grad(), model.unquantized():
        found = model(ids)
        expected = GraphModel(source.graph, source.weights, {})(ids)
        rounded = GraphModel(source.graph, source.weights, recipe.schemes(source.graph))(ids)
    values = model.weights()
    moved = [
        name
        for name in source.graph.params
        if name.endswith("norm.weight") and not np.allclose(values[name].to_f32(), source.weights[name].to_f32())
    ]
    assert bool(moved) == start.startswith("awq")
    if start in ("weights", "awq") or recipe.format != "int4-g32":
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        with torch.no_grad():
            torch.testing.assert_close(model(ids), found, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, rounded, atol=1e-2)


def test_the_whole_of_it_is_served_and_refits_a_running_model(tmp_path):
    path = write_model(tmp_path)
    config = QatConfig(
        recipe=Recipe(), training=TrainingConfig(steps=20, batch_size=4, learning_rate=2e-3, compute="f32"),
        sequences=32, length=32,
    )  # fmt: skip
    judging = Judging(length=32, calibration_texts=4, held_out_texts=4)
    seen, told = [], []
    result = train_qat(
        path, tmp_path / "out", config, judging, report=lambda step, _: seen.append(step), progress=told.append
    )
    assert seen == list(range(20))
    matrices = list(config.recipe.schemes(open_source(path).graph))
    assert told == [
        "32 sequences of 32 tokens", "text to calibrate on", *matrices, "training", "what it does to held-out text",
    ]  # fmt: skip
    assert result.trained.kl_mean < result.nearest.kl_mean
    assert not (tmp_path / ".out.qat").exists()
    assert (tmp_path / "out/curve.svg").read_text().startswith("<svg")
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with LLM(str(tmp_path / "out"), max_num_seqs=2) as llm:
        expected = llm.generate("abc", greedy)[0].outputs[0].token_ids
        llm.update_weights(tmp_path / "out")
        output = llm.generate("abc", greedy)[0].outputs[0]
        assert (output.token_ids, set(output.weight_versions)) == (expected, {1})
        update = llm.update_weights(hf_named(llm.model.spec, result.model.weights()))
        assert update.requantized == len(config.recipe.schemes(result.model.graph))
        output = llm.generate("abc", greedy)[0].outputs[0]
        assert (output.token_ids, set(output.weight_versions)) == (expected, {2}), "masters round to what was written"


def test_the_command(tmp_path, capsys):
    path = write_model(tmp_path)
    few = ["--steps", "2", "--sequences", "16", "--length", "32", "--batch-size", "4", "--compute", "f32"]
    assert main(["train", "qat", path, "-o", str(tmp_path / "out"), "--data", "corpus", *few]) == 0
    shown = capsys.readouterr()
    assert "step 2/2" in shown.err
    assert f"wrote {tmp_path / 'out'}" in shown.out
    for wrong in (
        ["--loss", "magic"], ["--data", "web"], ["--start", "rtn"],
        ["--start", "gptq", "--format", "mxfp4"], ["--data", "own,chat,corpus", "--sequences", "2"],
        ["--compute", "int8"], ["--format", "int3-g32"], ["--device", "cuda:99"]
    ):  # fmt: skip
        assert main(["train", "qat", path, "-o", str(tmp_path / "x"), *few, *wrong]) == 1
        assert "error:" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
