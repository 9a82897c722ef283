"""From a model's file to a quantized folder that is served, on tiny models."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.base.errors import InvalidRequestError, StorageError, UnsupportedModelError
from headrace.cli.main import main
from headrace.compress.gate import Thresholds
from headrace.compress.pipeline import GateError, Judging, make_evaluator, open_source, quantize_model, windows
from headrace.compress.quantizer import quantize_weights
from headrace.compress.recipe import Recipe
from headrace.compress.store import Store
from headrace.executors.native_weights import planned_bytes
from headrace.formats.safetensors import read_safetensors
from tests.support.tiny_model import write_model

ANYTHING = Thresholds(kl=None, flips=None, perplexity=None)
JUDGING = Judging(length=48, calibration_texts=4, held_out_texts=3, thresholds=ANYTHING)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


def quantized(model, target, recipe, judging=JUDGING):
    return quantize_model(model, target, recipe, judging, command=["headrace", "quantize"], progress=lambda name: None)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="gptq"),
        Recipe(method="awq+gptq"),
        Recipe(method="awq", format="int4-g32-asym"),
        Recipe(format="int8-channel", logits="int8-channel"),
        Recipe(format="fp8-block"),
        Recipe(format="mxfp4"),
        Recipe(format="nvfp4", method="awq"),
    ],
    ids=lambda recipe: recipe.title,
)
def test_the_folder_is_served_as_the_torch_executor_reads_it(model, tmp_path, recipe):
    card = quantized(model, tmp_path / "out", recipe)
    assert not (tmp_path / ".out.work").exists()
    answers = []
    for executor in ("native", "torch"):
        with LLM(str(tmp_path / "out"), max_num_seqs=2, executor=executor, activation="f32", kv_format="f32") as llm:
            answers.append(llm.generate("abc", GREEDY)[0].outputs[0])
            tokens = llm.tokenizer.encode("abab <|end|>!")
            assert llm.chat([{"role": "user", "content": "abc"}], GREEDY)[0].outputs[0].token_ids
    assert answers[0].token_ids == answers[1].token_ids
    with LLM(model, max_num_seqs=2) as llm:
        assert llm.tokenizer.encode("abab <|end|>!") == tokens
    held = json.loads((tmp_path / "out/card.json").read_text())
    assert held["evaluation"]["divergence"]["kl_mean"] == card.evaluation.divergence.kl_mean > 0
    assert (tmp_path / "out/card.md").read_text() == card.to_markdown()
    assert all(each.kl_mean is not None and each.kl_mean > 0 for each in card.blame[:5]), "scale moved or not"
    stored = read_safetensors(tmp_path / "out/model.safetensors")
    assert card.quantized_bytes == sum(tensor.num_bytes for tensor in stored.values())
    served = open_source(str(tmp_path / "out"))
    assert card.quantized_memory == planned_bytes(served.graph, served.weights, None, "auto")


@pytest.mark.parametrize(
    ("name", "bits", "of_matrix"),
    [
        ("int4-g32", 4 + 16 / 32, 128),  # its shape, two numbers of 64 bits
        ("int4-g32-asym", 4 + (16 + 4) / 32, 128),  # the zero point has 8 bits in memory
        ("int8-g32-asym", 8 + (16 + 8) / 32, 128),
        ("mxfp4", 4 + 8 / 32, 0),
        ("nvfp4", 4 + 8 / 16, 32),  # the scale has 32 bits in memory; here a divisor
    ],
)
def test_the_card_counts_bits_as_the_file_holds_them(model, tmp_path, name, bits, of_matrix):
    card = quantized(model, tmp_path / "out", Recipe(format=name))
    matrices = open_source(model).graph
    shapes = [matrices.params[each].shape for each in matrices.linear_matrices if each not in matrices.logits_params]
    num_weights = sum(rows * features for rows, features in shapes)
    assert card.bits_per_weight == pytest.approx(bits + of_matrix * len(shapes) / num_weights)
    stored = read_safetensors(tmp_path / "out/model.safetensors")
    parts = (tensor for key, tensor in stored.items() if not key.endswith(".weight"))
    assert card.bits_per_weight == pytest.approx(8 * sum(tensor.num_bytes for tensor in parts) / num_weights)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(format="q4_0", method="gptq", logits="q8_0"),
        Recipe(format="q4_1", method="awq"),
        Recipe(format="q8_0", ignore=("layers.1.*.down.*",)),
    ],
    ids=lambda recipe: recipe.title,
)
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_gguf_file_of_a_file_and_of_a_folder(model, tmp_path, recipe, kind):
    stored = "F32" if kind == "gguf" else "BF16"
    if kind == "folder":
        quantized(model, tmp_path / "hf", Recipe(format="fp8-channel", ignore=("layers.1.*",), logits="int8-channel"))
        model = str(tmp_path / "hf")
        recipe = replace(recipe, logits="q8_0")  # GGUF does not hold what it is stored as
    card = quantized(model, tmp_path / "out/m.gguf", recipe)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"m.gguf", "m.card.md", "m.card.json"}
    assert (tmp_path / "out/m.card.md").read_text() == card.to_markdown()
    found = gguf.GGUFReader(tmp_path / "out/m.gguf")
    assert card.quantized_bytes == sum(tensor.n_bytes for tensor in found.tensors)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in found.tensors}
    assert kinds["blk.0.attn_q.weight"] == recipe.format.upper()
    assert kinds["blk.1.ffn_down.weight"] == (recipe.format.upper() if not recipe.ignore else stored)
    assert kinds["token_embd.weight"] == ("Q8_0" if recipe.logits else "F32")
    file_types = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
                  "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}  # fmt: skip
    assert found.fields["general.file_type"].contents() == file_types[recipe.format]
    answers = []
    for executor in ("native", "torch"):
        path = str(tmp_path / "out/m.gguf")
        with LLM(path, max_num_seqs=2, executor=executor, activation="f32", kv_format="f32") as llm:
            answers.append(llm.generate("abc", GREEDY)[0].outputs[0].token_ids)
            assert llm.tokenizer.encode("abab <|end|>!")
            assert llm.chat([{"role": "user", "content": "abc"}], GREEDY)[0].outputs[0].token_ids
    assert answers[0] == answers[1]


def test_the_gguf_file_holds_the_values_that_were_judged(model, tmp_path):
    """Rows of q and k lie in another order in the file than in the graph."""
    recipe = Recipe(format="q4_0", method="gptq")
    source = open_source(model)
    ids = windows(source, JUDGING, "calibration")
    judged = quantize_weights(source.graph, source.weights, recipe, ids).weights
    quantized(model, tmp_path / "m.gguf", recipe)
    written = open_source(str(tmp_path / "m.gguf")).weights
    assert written.keys() == judged.keys()
    for name, tensor in judged.items():
        np.testing.assert_array_equal(written[name].to_f32(), tensor.to_f32())


@pytest.mark.parametrize(
    ("target", "recipe", "why"),
    [
        ("m.gguf", Recipe(), r"A GGUF file \(.*m.gguf\) does not hold int4-g32"),
        ("m.gguf", Recipe(format="int4-g128"), "does not hold int4-g128"),
        ("out", Recipe(format="q4_0"), r"A folder \(.*out\) does not hold q4_0"),
    ],
)
def test_formats_and_kinds_of_file_that_do_not_go_together(model, tmp_path, target, recipe, why):
    before = set(tmp_path.iterdir())
    with pytest.raises(InvalidRequestError, match=why):
        quantized(model, tmp_path / target, recipe)
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(InvalidRequestError, match="not held by the same kind of file"):
        Recipe(format="q4_0", logits="int8-channel")


def test_what_gguf_does_not_hold_is_named_before_anything_is_done(model, tmp_path, monkeypatch):
    quantized(model, tmp_path / "hf", Recipe(format="int8-channel"))
    monkeypatch.setattr(Store, "keep", lambda *_: pytest.fail("a matrix was rounded"))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.down\.weight is stored as int8_g64_bf16"):
        quantized(str(tmp_path / "hf"), tmp_path / "m.gguf", Recipe(format="q8_0", ignore=("layers.0.mlp.down.*",)))
    assert not list(tmp_path.glob("*m.*"))


def test_a_card_in_the_way(model, tmp_path):
    (tmp_path / "m.card.json").write_text("precious")
    with pytest.raises(InvalidRequestError, match=r"m\.card\.json exists already"):
        quantized(model, tmp_path / "m.gguf", Recipe(format="q8_0"))
    assert (tmp_path / "m.card.json").read_text() == "precious"


def test_a_quantized_folder_can_be_quantized_again(model, tmp_path):
    quantized(model, tmp_path / "first", Recipe(format="int8-channel"))
    quantized(str(tmp_path / "first"), tmp_path / "second", Recipe())
    with LLM(str(tmp_path / "second"), max_num_seqs=1) as llm:
        assert len(llm.generate("abc", GREEDY)[0].outputs[0].token_ids) == 8


def test_the_gate_writes_nothing_and_names_what_costs_most(model, tmp_path, monkeypatch):
    strict = Judging(length=48, calibration_texts=4, held_out_texts=3, thresholds=Thresholds(kl=1e-9))
    with pytest.raises(GateError, match="mean KL") as caught:
        quantized(model, tmp_path / "out", Recipe(), strict)
    assert "--ignore layers." in caught.value.remedy
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Store, "keep", lambda *_: pytest.fail("a matrix was made again"))
    quantized(model, tmp_path / "out", Recipe())
    assert (tmp_path / "out/card.md").exists()


def test_what_exists_is_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(InvalidRequestError, match="exists already"):
        quantized(model, tmp_path / "out", Recipe())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        quantized(model, tmp_path / "file" / "out", Recipe())


def test_windows_are_apart_and_the_same_each_time(model):
    source = open_source(model)
    judging = Judging(length=32, calibration_texts=20, held_out_texts=20, held_out=("corpus",))
    calibration, held_out = (windows(source, judging, part) for part in ("calibration", "held_out"))
    assert calibration.shape == held_out.shape == (20, 32)
    assert not {tuple(row) for row in calibration} & {tuple(row) for row in held_out}
    np.testing.assert_array_equal(calibration, windows(source, judging, "calibration"))
    with pytest.raises(InvalidRequestError, match="pieces of"):
        windows(source, judging, "held_out", more=10**6)


def test_texts_of_the_users_own(model, tmp_path):
    """What is fitted to and what is judged by come from the files."""
    mine, others = tmp_path / "mine.jsonl", tmp_path / "others.txt"
    mine.write_text("".join(json.dumps({"text": f"{i} abcxyz!"}) + "\n" for i in range(20)))
    others.write_text("zyxw" * 50)
    source = open_source(model)
    judging = Judging(
        length=8, calibration_texts=4, held_out_texts=2, calibration=(str(mine),), held_out=(str(others),)
    )
    np.testing.assert_array_equal(
        windows(source, judging, "calibration")[0],
        [*source.tokenizer.encode("0 abcxyz!"), *source.tokenizer.encode("1")][:8],
    )
    np.testing.assert_array_equal(windows(source, judging, "held_out")[0], source.tokenizer.encode("zyxw" * 50)[:8])
    recipe = Recipe(method="gptq")
    cards = [
        quantized(model, tmp_path / name, recipe, replace(used, thresholds=ANYTHING))
        for name, used in (("a", judging), ("b", replace(judging, calibration=None)))
    ]
    assert cards[0].calibration_tokens == 32
    assert [each.name for each in cards[0].evaluation.by_kind] == [str(others)]
    assert cards[0].evaluation.divergence.kl_mean != cards[1].evaluation.divergence.kl_mean
    with pytest.raises(InvalidRequestError, match=r"others.txt has \d+ pieces"):
        windows(source, replace(judging, held_out_texts=100), "held_out")
    with pytest.raises(InvalidRequestError, match="both what is calibrated on"):
        Judging(calibration=("own", str(mine)), held_out=(f"{tmp_path}/./mine.jsonl",))


def test_kinds_follow_each_other(model):
    source = open_source(model)
    judging = Judging(length=16, calibration_texts=5, held_out=("corpus", "own"), held_out_texts=4)
    alone = replace(judging, calibration=("corpus",), calibration_texts=2, held_out=("corpus",), held_out_texts=2)
    calibration, held_out = (windows(source, judging, part) for part in ("calibration", "held_out"))
    assert calibration.shape == (5, 16)
    np.testing.assert_array_equal(calibration[3:], windows(source, alone, "calibration"))
    np.testing.assert_array_equal(held_out[:2], windows(source, alone, "held_out"))
    assert not {tuple(row) for row in calibration} & {tuple(row) for row in held_out}
    found = make_evaluator(source, judging).compare(source.weights, num_texts=3)
    assert [(each.name, each.count) for each in found.by_kind] == [("corpus", 30), ("own", 15)]


def test_the_command(model, tmp_path, capsys):
    small = ["--length", "48", "--calibration-texts", "4", "--held-out-texts", "3"]
    assert main(["quantize", model, "-o", str(tmp_path / "out"), "--no-gate", *small]) == 0
    shown = capsys.readouterr().out
    assert "| perplexity |" in shown
    assert f"wrote {tmp_path / 'out'}" in shown
    assert (
        main(["quantize", model, "-o", str(tmp_path / "strict"), "--format", "int4-g32", "--max-kl", "1e-9", *small])
        == 1
    )
    assert "too far from its source" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
    assert main(["quantize", model, "-o", str(tmp_path / "m.gguf"), "--no-gate", *small]) == 0
    assert "q4_0 awq+gptq" in capsys.readouterr().out
    assert main(["quantize", model, "-o", str(tmp_path / "mx"), "--format", "mxfp4", "--no-gate", *small]) == 0
    assert "mxfp4 awq," in capsys.readouterr().out.replace("\n", ",")
    assert main(["quantize", model, "--compare", "int4-g32:rtn,int8-channel", *small]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "recipe", "source", "int4-g32", "int8-channel",
    ]  # fmt: skip
    for wrong in (["-o", "x", "--compare", "int4-g32"], [], ["-o", "x", "--no-gate", "--max-kl", "1"]):
        assert main(["quantize", model, *wrong]) == 1
