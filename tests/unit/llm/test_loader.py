"""A whole small model from a file on disk to its answer: what loading reads, says and refuses."""

import logging

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.base.errors import CheckpointError, InvalidRequestError, TemplateError
from headrace.models import build_graph, load_spec, sources
from tests.support.checkpoints import write_tiny_gguf

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
TOKENS = [*(chr(code) for code in range(33, 127)), "ab", "<|end|>"]
METADATA = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 1) + [3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": len(TOKENS) - 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def write_model(path, without=(), more=(), **metadata):
    """A llama of two layers and random weights, lacking some of its tensors, holding more than it has a use for."""
    values = METADATA | {key.replace("__", "."): value for key, value in metadata.items()}
    spec = load_spec(values | {"general.architecture": "llama"}, "gguf", tensors={})
    params = build_graph(spec).params
    draw = np.random.default_rng(0)
    shapes = {source.name: params[name].shape for name, source in sources(spec, "gguf").items()}
    tensors = {
        name: draw.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in (shapes | dict.fromkeys(more, (4, 32))).items()
        if name not in without
    }
    return str(write_tiny_gguf(path / "tiny.gguf", values, tensors))


def test_both_executors_answer_alike_and_say_what_they_are(tmp_path):
    path = write_model(tmp_path)
    answers = []
    for executor, shown in (("native", "matrices)"), ("torch", "TorchExecutor")):
        with LLM(path, executor=executor, kv_format="f32", max_num_seqs=2) as llm:
            (result,) = llm.generate("abc", GREEDY)
            answers.append(result.outputs[0].token_ids)
            told = llm.describe()
        assert "tiny: llama, 2 layers" in told
        assert "8 blocks of 16 tokens, f32" in told, "two contexts of 64"
        assert "pack weights" in told
        assert shown in told
    assert len(answers[0]) == 6
    assert answers[0] == answers[1]


def test_tensors_without_a_use_are_named(tmp_path, caplog):
    path = write_model(tmp_path, more=("blk.0.mystery.weight", "v.patch_embd.weight"))
    with caplog.at_level(logging.WARNING), LLM(path, max_num_seqs=1):
        pass
    assert "blk.0.mystery.weight, v.patch_embd.weight" in caplog.text


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*blk\.1\.ffn_down\.weight"):
        LLM(write_model(tmp_path, without=("blk.1.ffn_down.weight",)))


def test_an_unreadable_template_hurts_chat_alone(tmp_path):
    path = write_model(tmp_path, tokenizer__chat_template="{% for message in %}")
    with LLM(path, max_num_seqs=1) as llm:
        assert len(llm.generate("abc", GREEDY)[0].outputs[0].token_ids) == 6
        with pytest.raises(TemplateError, match="line 1"):
            llm.chat([{"role": "user", "content": "abc"}])


def test_the_environment_chooses_instruction_set_and_threads(tmp_path, monkeypatch):
    path = write_model(tmp_path)
    monkeypatch.setenv("HEADRACE_ISA", "portable")
    monkeypatch.setenv("HEADRACE_THREADS", "1")
    with LLM(path, max_num_seqs=1) as llm:
        assert "kernels  portable, f32 activations, 1 thread: " in llm.describe()
    with LLM(path, max_num_seqs=1, num_threads=2) as llm:
        assert llm.num_threads == 2, "an argument outranks the environment"


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_misspelled_variable_is_an_error_before_anything_is_read(executor, monkeypatch):
    monkeypatch.setenv("HEADRACE_THREAD", "1")
    with pytest.raises(InvalidRequestError, match=r"HEADRACE_THREAD\b"):
        LLM("/nowhere/model.gguf", executor=executor)
