import pytest

from headrace.bench.roofline import _by_op, _difference, fused_ops, works
from tests.support.tiny_llama import tiny_llama

GRAPH = tiny_llama()  # 5 norms, 4 sums, 4 rotations, 2 gated units


def test_kinds_without_an_op_of_their_own_are_counted_where_they_are_done():
    apart = {"rms_norm": (1.0, 50), "add": (1.0, 40), "rope": (1.0, 40), "glu": (1.0, 20), "linear": (9.0, 150)}
    assert fused_ops(GRAPH, apart, num_steps=10) == {}
    some = apart | {"rms_norm": (0.1, 10)}
    del some["add"]
    assert fused_ops(GRAPH, some, num_steps=10) == {"rms_norm": "linear", "add": "linear"}


def test_seconds_are_of_a_step_and_belong_to_nodes():
    profile = {
        "prepare": (1.0, 10),
        "linear": (3.0, 10),
        "rms_norm": (0.5, 10),
        "join": (0.2, 2),
        "attention": (0.8, 2),
    }
    found = _by_op(profile, num_steps=2, joined={"rms_norm": "linear"})
    assert found == pytest.approx({"linear": 2.25, "attention": 0.5})


def test_a_profile_is_what_came_since():
    assert _difference({"add": (1.0, 3)}, {"add": (1.5, 5), "glu": (0.25, 1)}) == {"add": (0.5, 2), "glu": (0.25, 1)}


def test_decode_follows_prompts_of_whole_blocks_and_one_token():
    one, many, prefill = works(1000, num_seqs=[1, 4], input_len=40, output_len=8, block_size=16)
    assert [len(prompt) for prompt in many.batch.prompts] == [33] * 4
    assert (many.num_steps, many.is_decode, many.cost.sampled_rows) == (8, True, 4)
    assert one.cost.sequences[0].context_len == 36, "in the middle of the output"
    assert (prefill.name, prefill.is_decode, len(prefill.batch.prompts[0])) == ("prefill 160", False, 160)
