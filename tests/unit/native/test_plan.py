"""Placement of buffers in the arena, and plans that replay to the same bits whatever runs beside."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace._native import available_isas
from headrace.executors.native import NativeExecutor
from headrace.executors.native_plan import Buffer, Instruction, place
from tests.support.stepping import Stepper
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama


@st.composite
def programs(draw) -> tuple[list[Instruction], list[Buffer]]:
    """Instructions that each write one buffer and read some earlier ones, and the buffers to keep."""
    buffers = [Buffer(64 * draw(st.integers(1, 9))) for _ in range(draw(st.integers(1, 12)))]
    instructions = []
    for i, buffer in enumerate(buffers):
        reads = draw(st.lists(st.sampled_from(buffers[:i]), max_size=3)) if i else []
        instructions.append(Instruction(tuple(reads), (buffer,), lambda plan: None))
    return instructions, draw(st.lists(st.sampled_from(buffers), max_size=2))


@given(programs())
def test_buffers_that_live_together_are_apart(program) -> None:
    instructions, kept = program
    total = place(instructions, kept)
    lives = {}
    for i, instruction in enumerate(instructions):
        for buffer in (*instruction.writes, *instruction.reads):
            first, _ = lives.get(buffer, (i, i))
            lives[buffer] = (first, i)
    for buffer in kept:
        lives[buffer] = (lives[buffer][0], len(instructions))
    for a, (a_first, a_last) in lives.items():
        assert 0 <= a.offset <= total - a.num_bytes
        for b, (b_first, b_last) in lives.items():
            if a is not b and a_first <= b_last and b_first <= a_last:
                assert a.offset + a.num_bytes <= b.offset or b.offset + b.num_bytes <= a.offset


def test_dead_buffers_are_used_again() -> None:
    a, b, c = Buffer(640), Buffer(640), Buffer(640)
    steps = [Instruction((), (a,), print), Instruction((a,), (b,), print), Instruction((b,), (c,), print)]
    assert place(steps) == 1280


def test_kept_buffers_are_not() -> None:
    a, b, c = Buffer(640), Buffer(640), Buffer(640)
    steps = [Instruction((), (a,), print), Instruction((a,), (b,), print), Instruction((b,), (c,), print)]
    assert place(steps, [a]) == 1920


@pytest.mark.parametrize("isa", available_isas())
def test_taps_change_no_value(isa) -> None:
    """Tapping every node lays the arena out anew; the logits stay, and equal the ones tapped alone."""
    graph = tiny_llama(window=5)
    work = {"a": list(range(20)), "b": [VOCAB - 1]}
    names = tuple(node.name for node in graph.nodes)

    def logits(taps: tuple[str, ...]) -> np.ndarray:
        executor = NativeExecutor(
            graph,
            random_weights(graph),
            num_blocks=8,
            max_batched_tokens=32,
            max_num_seqs=32,
            max_model_len=32,
            isa=isa,
        )
        return Stepper(executor).run(work, taps=taps).taps["logits"]

    alone = logits(("logits",))
    assert np.isfinite(alone).all()
    assert np.unique(alone.argmax(1)).size > 5
    np.testing.assert_array_equal(logits(names), alone)
