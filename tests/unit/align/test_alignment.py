"""Two subjects over one tiny model: what is equal is found equal, what is planted is found where it was planted."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from headrace.align import alignment, report
from headrace.align.alignment import align, token_windows
from headrace.align.sides import side_named
from headrace.align.subjects import Subject, open_subject, subject_named
from headrace.base.errors import InvalidRequestError, MissingDependencyError
from headrace.cli.main import main
from headrace.numerics.tensor import RawTensor
from tests.support.tiny_model import write_model

TOKENS = [np.random.default_rng(i).integers(0, 90, 32).tolist() for i in range(3)]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def compared(a, b, **options):
    return align(a, b, TOKENS, **{"threshold": 1e-4, "by_cause": False, **options})


def test_a_subject_beside_itself_is_equal_in_every_bit(model):
    for subject in (Subject(model=model), Subject(model=model, executor="torch", dtype="float64", kv="f32")):
        found = compared(subject, subject)
        d = found.divergence
        assert (d.kl_max, d.logprob_delta_max, d.top1_agreement, found.policy.k3) == (0, 0, 1, 0)
        assert all(node.total == 0 for node in found.nodes)
        assert not found.exceeded({"kl": 1e-12, "clipped": 1e-12})


def test_float32_on_both_executors_departs_nowhere(model):
    a = Subject(model=model, executor="torch", kv="f32")
    b = Subject(model=model, activation="f32", kv="f32")
    found = compared(a, b)
    assert found.first is None
    assert found.divergence.logprob_delta_max < 1e-4
    assert [node.name for node in found.nodes] == [node.name for node in open_subject(a).graph.nodes]


def test_rounded_keys_and_values_are_found_in_attention_and_explained(model):
    a, b = Subject(model=model, activation="f32", kv="f32"), Subject(model=model, activation="f32", kv="int8")
    found = compared(a, b, by_cause=True)
    assert found.first == "layers.0.attn.core"
    own = {node.op for node in found.nodes if node.own > 1e-4}
    assert own == {"attention"}, "what others are off by they have inherited"
    assert max(node.total for node in found.nodes if node.op == "linear") > 1e-4
    (cause,) = found.causes
    assert (cause.name, cause.a, cause.b, cause.left, cause.explains) == ("kv", "f32", "int8", 0.0, 1.0)


def test_a_device_is_the_torch_executors(model):
    with pytest.raises(InvalidRequestError, match="Add executor=torch"):
        Subject(model=model, device="cuda")
    subject = subject_named(f"{model}?executor=torch&device=abacus")
    with pytest.raises(InvalidRequestError, match="abacus"):
        open_subject(subject).executor(8)


def test_causes_are_told_apart(model):
    a = Subject(model=model, executor="torch", dtype="float64", kv="f32")
    b = Subject(model=model, executor="torch", dtype="bfloat16", kv="bf16")
    causes = {cause.name: cause.explains for cause in compared(a, b, by_cause=True).causes}
    assert causes.keys() == {"dtype", "kv"}
    assert causes["dtype"] > causes["kv"]


def test_a_changed_parameter_is_found_at_its_node(model, monkeypatch):
    a, b = (
        Subject(model=model, activation="f32", kv="f32"),
        Subject(model=model, activation="f32", kv="f32", fused=False),
    )
    real = open_subject
    made = []

    def damaged(subject):
        opened = real(subject)
        made.append(subject)
        if len(made) != 2:
            return opened
        name = "layers.1.mlp.up.weight"
        values = np.array(opened.weights[name].to_f32())
        values[5] *= 1.5
        weights = replace(opened.weights, params={**opened.weights.params, name: RawTensor.from_f32(values)})
        return replace(opened, weights=weights)

    monkeypatch.setattr(alignment, "open_side", damaged)
    found = compared(a, b)
    departed = [node.name for node in found.nodes if node.total > 1e-4]
    assert departed[0] == "layers.1.mlp.up"
    assert found.first is None, "each node computes what its own parameters say"


@pytest.mark.parametrize("text", [
    "x?executor=cuda", "x?speed=1", "x?kv=f32&kv=bf16", "x?threads=many", "x?fused=yes", "x?kv", "x?dtype=int4",
    "x?foo", "http://host:1#m", "http://", "http://h:x/v1", "http://h/v1?kv=f32", "http://h/v1?top=21", "http://h/v1?timeout=0",
    "hf:folder?dtype=int8", "hf:folder?attn=flash", "hf:folder?kv=f32",
])  # fmt: skip
def test_subjects_that_make_no_sense_are_errors(text):
    with pytest.raises(InvalidRequestError) as caught:
        side_named(text)
    assert caught.value.remedy


def test_subjects_by_name():
    assert subject_named("native") == Subject()
    assert subject_named("torch") == Subject(executor="torch")
    found = subject_named("some/model?executor=torch&dtype=bfloat16&fused=1")
    assert found == Subject(model="some/model", executor="torch", dtype="bfloat16", fused=True)
    assert subject_named(found.title.replace("fused=True", "fused=1")) == found


def test_windows_of_a_text(model):
    tokenizer = open_subject(Subject(model=model)).tokenizer
    assert (
        token_windows(tokenizer, "abcdefgh", 3, 4)
        == [tokenizer.encode("abcdefgh")[:4], tokenizer.encode("abcdefgh")[4:8]][
            : len(tokenizer.encode("abcdefgh")) // 4
        ]
    )
    assert len(token_windows(tokenizer, "xyz", 3, 100)) == 1, "a short text is one piece"
    with pytest.raises(InvalidRequestError, match="fewer than two"):
        token_windows(tokenizer, "x", 1, 100)
    assert len(token_windows(tokenizer, None, 5, 32)) == 5


def test_the_command_and_its_reports(model, tmp_path, capsys):
    few = ["--texts", "2", "--length", "32", "--threshold", "1e-4"]
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    a, b = f"{model}?activation=f32&kv=f32", f"{model}?activation=f32&kv=int8"
    assert main(["align", a, b, *few, "--causes", *files, "--budget", "kl<0.5,dlogprob_p99<5"]) == 0
    shown = capsys.readouterr().out
    assert "layers.0.attn.core departs first by itself" in shown
    held = json.loads((tmp_path / "a.json").read_text())
    assert held["first"] == "layers.0.attn.core"
    page = (tmp_path / "a.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", ""), "nothing from elsewhere"
    assert main(["align", a, b, *few, "--budget", "kl<1e-9"]) == 1
    assert "beyond the budget: kl is" in capsys.readouterr().err
    for wrong in (
        ["--budget", "kl"],
        ["--budget", "magic<1"],
        ["--text", "/nonexistent"],
        ["--length", "1"],
        ["--svg", "x"],
    ):
        assert main(["align", a, b, *few, *wrong]) == 1
        assert not capsys.readouterr().out, "said before anything was compared"


def test_reports_say_the_same(model):
    found = compared(Subject(model=model, kv="f32"), Subject(model=model, kv="int8"))
    assert json.loads(report.to_json(found))["divergence"]["kl_mean"] == found.divergence.kl_mean
    assert report.to_text(found).splitlines()[0] in report.to_html(found)


def test_the_ladder_and_the_map(tmp_path, capsys):
    model = write_model(tmp_path, matrices="q8_0")
    few = ["--texts", "2", "--length", "32"]
    assert main(["align", model, "--ladder", *few]) == 0
    lines = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    kl = {title: float(cells[0]) for title, cells in lines.items()}
    assert 0 < kl["activations int16"] < kl["activations int8"]
    assert 0 < kl["KV bf16"] < kl["KV int8"] < kl["KV int4"]
    assert kl["KV bf16"] < kl["KV fp8"] < kl["KV int4"]
    assert 0 < kl["inputs int8 by token"] < kl["inputs fp8 by token"] < kl["inputs int4-g32"] < 2 * kl["W4A4, KV int4"]
    assert 0 < kl["weights int8-g32"] < kl["weights int4-g32"] < 2 * kl["W4A16, KV bf16"]
    assert main(["align", model, "--map", "int4-g32", "--svg", str(tmp_path / "map.svg"), *few]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["layer", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    assert len(shown) == 3
    assert (tmp_path / "map.svg").read_text().count("<rect") == 15
    assert main(["align", model, "--map", "int4-g32", "--of", "inputs", "--svg", str(tmp_path / "in.svg"), *few]) == 0
    rows = [[float(cell) for cell in line.split()[1:]] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 2
    assert all(cell > 0 for row in rows for cell in row)
    assert "what one matrix reads" in (tmp_path / "in.svg").read_text()
    for wrong in (
        [],
        ["--ladder", "--of", "inputs"],
        ["native", "--ladder"],
        ["--map", "int3-g32"],
        ["--ladder", "--budget", "kl<1"],
        ["--ladder", "--svg", "x"],
    ):
        assert main(["align", model, *wrong, *few]) == 1


def test_weights_in_a_scheme(model):
    a = Subject(model=model, activation="f32", kv="f32")
    one = replace(a, weights="int4-g32", only="layers.1.mlp.up.weight")
    found = compared(a, one)
    assert next(node.name for node in found.nodes if node.total > 1e-4) == "layers.1.mlp.up"
    assert compared(a, replace(one, only="*")).divergence.kl_mean > found.divergence.kl_mean
    (cause,) = compared(a, one, by_cause=True).causes
    assert (cause.name, cause.left, cause.explains) == ("weights", 0.0, 1.0)
    other = replace(one, only="layers.0.*")
    (cause,) = compared(other, one, by_cause=True).causes
    assert (cause.a, cause.b) == ("int4-g32 of layers.0.*", "int4-g32 of layers.1.mlp.up.weight")
    assert cause.left == 0.0
    for wrong in ({"weights": "int4-g32", "only": "nothing"}, {"only": "layers.*"}, {"weights": "int3"}):
        with pytest.raises(InvalidRequestError):
            open_subject(replace(a, **wrong))


def test_each_way_of_computing_is_a_cause_of_its_own(model):
    a = Subject(model=model, executor="torch", kv="f32")
    b = replace(a, rope="bf16", norm="bf16", residual="add", inputs="int8-channel", inputs_of="layers.1.*")
    found = compared(a, b, by_cause=True)
    causes = {cause.name: cause for cause in found.causes}
    assert causes.keys() == {"rope", "norm", "residual", "inputs"}
    assert all(cause.left < found.divergence.logprob_delta_mean * 1.5 for cause in causes.values())
    assert (causes["inputs"].a, causes["inputs"].b) == ("exact", "int8-channel of layers.1.*")
    assert found.first == "layers.0.attn_norm"
    own = {node.op for node in found.nodes if node.own > 1e-4}
    assert own == {"rms_norm", "rope", "add", "linear"}
    (cause,) = compared(a, replace(a, norm="bf16"), by_cause=True).causes
    assert (cause.left, cause.explains) == (0.0, 1.0)


def test_numerics_go_with_their_executor(model):
    native, b = Subject(model=model, kv="f32"), Subject(model=model, executor="torch", kv="f32")
    (cause,) = compared(native, replace(b, rope="bf16"), by_cause=True).causes
    assert (cause.name, cause.left) == ("executor", 0.0)
    (cause,) = compared(replace(b, rope="bf16"), native, by_cause=True).causes
    assert (cause.name, cause.left) == ("executor", 0.0)
    with pytest.raises(InvalidRequestError, match="torch executor"):
        subject_named(f"{model}?rope=bf16")


def test_what_is_done_to_logits_afterwards_is_a_cause(model):
    a = Subject(model=model, kv="f32")
    coarse = compared(a, replace(a, logprobs="bf16"), by_cause=True)
    assert np.isnan(coarse.divergence.kl_mean)
    assert 1e-4 < coarse.divergence.logprob_delta_mean < 0.1
    assert coarse.causes[0].left == 0
    warm = compared(a, subject_named(f"{model}?kv=f32&temperature=0.7"), by_cause=True)
    assert warm.divergence.top1_agreement == 1
    assert warm.divergence.kl_mean > 1e-3
    (cause,) = warm.causes
    assert (cause.name, cause.a, cause.b, cause.left) == ("temperature", "1.0", "0.7", 0.0)
    for wrong in ("x?temperature=0", "x?temperature=hot", "x?logprobs=f16"):
        with pytest.raises(InvalidRequestError):
            subject_named(wrong)


def test_a_side_of_transformers_without_transformers_says_so(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers"):
        compared(side_named(f"hf:{model}"), Subject(model=model))
