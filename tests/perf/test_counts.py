"""Costs that are counted, not timed, and so do not hang on the machine: what Python and the plan do per step."""

import sys

import pytest

from headrace import LLM, SamplingParams
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.executors.simulated import SimulatedExecutor
from headrace.llm.runtime import Runtime
from tests.support.byte_text import byte_tokenizer

NUM_SEQS, NUM_STEPS, VOCAB = 64, 40, 257
GREEDY = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)

ENGINE_CALLS = 40
"""Of Python and C functions, per decoded token, that the engine may make; counted with CPython 3.11: 31.4."""
RUNTIME_CALLS = 60
"""The same with detokenization around it; counted: 47.0."""
OPS_PER_LAYER = 18
"""Of a llama's plan, embedding, logits and sampling apart; counted: 16.2."""
BARRIERS_PER_LAYER = 13
"""Between ops that touch the same, at 64 rows; counted: 11.1."""


class Unseen(SimulatedExecutor):
    """An executor whose own calls are not counted."""

    def execute(self, step):
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            return super().execute(step)
        finally:
            sys.setprofile(profile)


@pytest.fixture
def engine():
    """With room for all sequences."""
    executor = Unseen(num_blocks=20 * NUM_SEQS, block_size=16, vocab_size=VOCAB, verify=False)
    return Engine(executor, EngineConfig(max_num_seqs=NUM_SEQS, max_num_batched_tokens=8192, max_model_len=2048))


def prompt(i):
    return [(i + j) % 256 for j in range(100)]


def calls_per_token(step):
    """Calls of Python and C functions per token, while every `step()` gives one token of each sequence."""
    for _ in range(2):
        step()  # prefill, and whatever happens once
    counted = 0

    def note(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        for _ in range(NUM_STEPS):
            made = step()
            assert len(made) == NUM_SEQS
    finally:
        sys.setprofile(None)
    return counted / (NUM_SEQS * NUM_STEPS)


def test_calls_of_the_engine(engine, report_figure):
    for i in range(NUM_SEQS):
        engine.add(Request(request_id=str(i), prompt_ids=tuple(prompt(i)), params=GREEDY))
    calls = calls_per_token(engine.step)
    report_figure(f"engine: {calls:.1f} calls per decoded token of {NUM_SEQS} sequences")
    assert calls <= ENGINE_CALLS


def test_calls_of_the_engine_with_text(engine, report_figure):
    runtime = Runtime(engine, byte_tokenizer(), 2048)
    for i in range(NUM_SEQS):
        runtime.submit(str(i), prompt(i), GREEDY)
    calls = calls_per_token(runtime.step)
    report_figure(f"engine and detokenization: {calls:.1f} calls per decoded token of {NUM_SEQS} sequences")
    assert calls <= RUNTIME_CALLS


def test_ops_and_barriers_of_a_step(report_figure):
    with LLM(max_model_len=256, num_threads=2) as llm:
        llm.generate([[1000 + i] for i in range(NUM_SEQS)], SamplingParams(max_tokens=2, temperature=0.0))
        plan, layers = llm.model.executor.describe(), llm.model.spec.num_layers
    report_figure(f"plan: {plan['num_ops']} ops, {plan['num_barriers']} barriers for {layers} layers at 64 rows")
    assert plan["num_ops"] <= OPS_PER_LAYER * layers
    assert plan["num_barriers"] <= BARRIERS_PER_LAYER * layers
