"""A whole small model from a file on disk to its answer: what loading reads, says and refuses."""

import logging
import threading

import pytest

from headrace import LLM, AsyncLLM, SamplingParams, _native
from headrace.base.errors import CapacityError, CheckpointError, InvalidRequestError, TemplateError
from headrace.executors.weight_cache import WeightCache
from tests.support.tiny_model import write_model

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


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


def test_matrices_can_be_had_in_another_format_than_they_are_stored_in(tmp_path):
    path = write_model(tmp_path, matrices="q8_0")
    answers = {}
    for name in (None, "f32", "bf16"):
        with LLM(path, max_num_seqs=1, weight_format=name, activation="f32", kv_format="f32") as llm:
            kinds = {llm.model.weights[param].format.name for param in llm.model.graph.params}
            answers[name] = llm.generate("abc", GREEDY)[0].outputs[0].token_ids
        assert kinds == {"f32", name or "q8_0"}, "vectors are f32"
    assert answers[None] == answers["f32"], "the same numbers"


def test_a_graph_runs_as_it_is_too(tmp_path):
    path = write_model(tmp_path)
    answers = []
    for fuse in (True, False):
        with LLM(path, max_num_seqs=1, fuse=fuse) as llm:
            assert any(node.name.endswith(".qkv") for node in llm.model.graph.nodes) == fuse
            answers.append(llm.generate("abc", GREEDY)[0].outputs[0].token_ids)
            assert llm.engine_snapshot().metrics.output_tokens == 6
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("name", "value"), [("isa", "mmx"), ("weight_format", "q4_0")])
def test_an_unknown_choice_is_an_error(name, value):
    with pytest.raises(InvalidRequestError, match=f"{name} '{value}' does not exist"):
        LLM("/nowhere/model.gguf", **{name: value})


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "available_isas", lambda: ["portable"])
    with pytest.raises(InvalidRequestError, match="does not have the instruction set 'avx2'"):
        LLM("/nowhere/model.gguf", isa="avx2")


def test_an_argument_outranks_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_ISA", _native.available_isas()[-1])
    with LLM(write_model(tmp_path), max_num_seqs=1, isa="portable") as llm:
        assert llm.model.executor.isa == "portable"


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    path = write_model(tmp_path)
    monkeypatch.setattr("headrace.llm.loader.available_memory", lambda: 10_000)
    for part in ("headrace.executors.native.NativeExecutor", "headrace.llm.loader.load_text"):
        monkeypatch.setattr(part, lambda *_, **__: pytest.fail("loaded all the same"))
    with pytest.raises(CapacityError, match=r"weights need 0\.1 MiB, and 0\.0 MiB of memory is free") as caught:
        LLM(path)
    assert "more strongly quantized" in caught.value.remedy


def test_packed_weights_are_kept_where_the_cache_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(WeightCache.__init__, "__defaults__", (0, 1 << 30))  # as if a tiny model were worth it
    path = write_model(tmp_path)
    read = []
    for weight_cache in ("off", "auto", "auto", "off"):
        with LLM(path, max_num_seqs=1, weight_cache=weight_cache) as llm:
            read.append(llm.model.executor.describe()["weights_from_cache"])
        for thread in threading.enumerate():
            if thread.name == "headrace-weight-cache":
                thread.join()
    assert read == [False, False, True, False]
    assert len(list((tmp_path / "cache/headrace/packed").glob("*.packed"))) == 1
    with pytest.raises(InvalidRequestError, match="weight_cache 'on' does not exist"):
        LLM(path, weight_cache="on")


def test_a_vocabulary_that_cannot_encode_hurts_text_alone_and_a_server_at_once(tmp_path):
    path = write_model(tmp_path, tokenizer__ggml__merges=["no such"])
    with LLM(path, max_num_seqs=1) as llm:
        assert len(llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids) == 6
        with pytest.raises(CheckpointError, match="merges do not fit"):
            llm.generate("abc", GREEDY)
    with pytest.raises(CheckpointError, match="merges do not fit"):
        AsyncLLM(path, max_num_seqs=1)
