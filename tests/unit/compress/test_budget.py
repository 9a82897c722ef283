"""Formats for single matrices: what they cost, the best for a budget, the smallest that keeps to a limit."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from headrace.base.errors import InvalidRequestError
from headrace.cli.main import main
from headrace.compress.allocation import Ladder
from headrace.compress.awq import output_error
from headrace.compress.budget import is_budget, parse_budget
from headrace.compress.gate import Evaluator
from headrace.compress.gptq import gptq, remaining_errors
from headrace.compress.planner import LimitError, lowest_rung
from headrace.compress.sensitivity import Option, measure_options
from headrace.executors.native_quantize import quantize_tensor
from headrace.formats.checkpoint import open_checkpoint
from headrace.formats.compressed_tensors_writer import stored_bytes
from headrace.formats.safetensors import read_safetensors
from headrace.numerics.quantize import quantize
from headrace.numerics.schemes import scheme_named
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama
from tests.support.tiny_model import write_model

SMALL = ["--length", "48", "--calibration-texts", "4", "--held-out-texts", "3", "--method", "rtn"]


def test_budgets_are_bits_or_bytes():
    assert parse_budget("4.6bits").bits == 4.6
    assert parse_budget("110MB").num_bytes == 110_000_000
    assert parse_budget("1.5 MiB").num_bytes == 3 << 19
    assert is_budget("5bits")
    assert not is_budget("int4-g32")
    for wrong in ("4.6", "bits", "-3bits", "0bits", "4.6 parsecs", "int4-g32", "80M"):
        with pytest.raises(InvalidRequestError, match="is no budget"):
            parse_budget(wrong)


OPTIONS = {
    "a": [Option("s", 10, 1.0), Option("m", 14, 0.9), Option("l", 20, 0.1)],  # "m" is above the hull
    "b": [Option("s", 10, 5.0), Option("m", 12, 2.0), Option("l", 20, 1.0), Option("worse", 15, 3.0)],
    "c": [Option("s", 10, 0.2), Option("l", 15, 0.1)],
}


def test_every_rung_is_the_best_choice_of_its_size():
    ladder = Ladder(OPTIONS)
    every = [(sum(o.num_bytes for o in picked), sum(o.kl for o in picked)) for picked in product(*OPTIONS.values())]
    for i, (size, cost) in enumerate(zip(ladder.sizes, ladder.costs, strict=True)):
        chosen = ladder.rung(i).values()
        assert (size, pytest.approx(cost)) == (sum(o.num_bytes for o in chosen), sum(o.kl for o in chosen))
        assert cost == pytest.approx(min(kl for num_bytes, kl in every if num_bytes <= size))
    assert ladder.sizes == (30, 32, 40, 50, 55)


def test_a_budget_between_rungs_is_filled_with_what_still_fits():
    ladder = Ladder(OPTIONS)
    assert {name: o.format for name, o in ladder.within(46).items()} == {"a": "s", "b": "l", "c": "l"}
    assert {name: o.format for name, o in ladder.within(1000).items()} == {"a": "l", "b": "l", "c": "l"}


@pytest.mark.parametrize("wrong_by", [0.3, 1.0, 4.0])
def test_the_search_ends_just_under_the_limit_whatever_the_prediction_is_wrong_by(wrong_by):
    ladder = Ladder({f"m{i}": [Option("s", 100, 1.0 / (1 + i)), Option("l", 200, 0.0)] for i in range(60)})
    asked = []

    def measure(rung):
        asked.append(rung)
        return wrong_by * ladder.costs[rung]

    limit = 0.4
    rung = lowest_rung(ladder, limit, measure)
    assert measure(rung) <= limit < wrong_by * ladder.costs[rung - 3]
    assert len(asked[:-1]) == len(set(asked[:-1])) <= 6


def test_a_limit_that_nothing_reaches_is_said():
    with pytest.raises(LimitError, match="best formats"):
        lowest_rung(Ladder(OPTIONS), 0.5, lambda rung: 0.6)


def test_predicted_costs_are_near_the_measured_ones():
    graph = tiny_llama()
    weights = random_weights(graph)
    ids = np.random.default_rng(0).integers(0, VOCAB, (24, 24))
    names = [name for name in graph.linear_matrices if name not in graph.logits_params]
    options = measure_options(graph, weights, dict.fromkeys(names, ("int4-g32", "int8-channel", "bf16")), ids)
    evaluator = Evaluator(graph, weights, ids.tolist())
    ratios = []
    for name in names:
        four, eight, plain = options[name]
        rounded = quantize_tensor(weights[name], scheme_named("int4-g32"))
        assert four.num_bytes == stored_bytes(rounded, scheme_named("int4-g32")) < eight.num_bytes < plain.num_bytes
        assert plain.kl == 0 < eight.kl < 0.05 * four.kl
        ratios.append(four.kl / evaluator.compare({**weights, name: rounded}).divergence.kl_mean)
    assert 0.5 < np.exp(np.log(ratios).mean()) < 2
    assert 0.3 < min(ratios) < max(ratios) < 3


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


def test_a_budget_in_bits_makes_a_mixed_folder_that_is_read_again(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", model, "-o", str(out), "--budget", "6bits", "--no-gate", *SMALL]) == 0
    assert "Chosen for 6bits" in capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    assert 5 < card["planned"]["bits"] <= 6
    chosen = dict(card["recipe"]["mixed"])
    assert len(set(chosen.values())) > 1
    tensors = open_checkpoint(out).tensors
    stored = read_safetensors(out / "model.safetensors").values()
    assert card["quantized_bytes"] == sum(tensor.num_bytes for tensor in stored)
    quantized = {name: format_name for name, format_name in chosen.items() if format_name != "bf16"}
    assert sum(tensor.format.block_size > 1 for tensor in tensors.values()) == len(quantized)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len(set(quantized.values()))


def test_a_budget_in_bytes_is_kept(model, tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", model, "-o", str(out), "--budget", "25kB", "--no-gate", *SMALL]) == 0
    assert json.loads((out / "card.json").read_text())["quantized_bytes"] <= 25_000


def test_the_smallest_model_under_a_limit(model, tmp_path):
    found = {}
    for limit in ("0.1", "0.001"):
        out = tmp_path / limit
        assert main(["quantize", model, "-o", str(out), "--max-kl", limit, *SMALL]) == 0
        found[limit] = json.loads((out / "card.json").read_text())
        assert found[limit]["evaluation"]["divergence"]["kl_mean"] <= float(limit)
        assert not (tmp_path / f".{limit}.work").exists()
    assert found["0.1"]["quantized_bytes"] < found["0.001"]["quantized_bytes"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--budget", "2bits"], "less than the smallest"),
        (["--budget", "17bits"], "more than the best"),
        (["--budget", "1kB"], "less than the smallest"),
        (["--budget", "4 parsecs"], "is no budget"),
        (["--budget", "5bits", "--max-kl", "0.1"], "contradict"),
        (["--budget", "5bits", "--format", "int4-g32"], "contradict"),
        (["--budget", "5bits", "--method", "smoothquant"], "weights of 8 bits"),
        (["--max-kl", "0"], "no limit"),
        (["--max-kl", "nan"], "no limit"),
    ],
)
def test_budgets_that_make_no_sense(model, tmp_path, capsys, wrong, said):
    assert main(["quantize", model, "-o", str(tmp_path / "out"), *SMALL, *wrong]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_gptq_leaves_is_predicted_for_text_that_it_has_not_seen():
    """One free value per column: on the inputs that it was fitted to, the error looks a fraction of what it is."""
    rng = np.random.default_rng(0)
    mixing = torch.from_numpy(rng.standard_normal((256, 256)) / 16 + np.eye(256)).float()
    fitted, met = (torch.from_numpy(rng.standard_normal((n, 256))).float() @ mixing for n in (320, 4096))
    weight = torch.from_numpy(rng.standard_normal((192, 256))).float()
    scheme = scheme_named("int4-g32")
    hessian, moment, own = fitted.T @ fitted, met.T @ met / len(met), fitted.T @ fitted / len(fitted)
    difference = torch.from_numpy(gptq(weight, hessian, scheme).to_f32()) - weight
    squares = torch.from_numpy(quantize(weight.numpy(), scheme).scales).double().square().repeat_interleave(32, 1) / 12

    def predicted(inputs):
        return float((squares @ remaining_errors(hessian, inputs)).sum())

    assert predicted(moment) == pytest.approx(output_error(difference, moment), rel=0.1)
    assert predicted(own) < 0.6 * predicted(moment)
