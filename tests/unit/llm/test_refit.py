"""New weights for a running model: which are taken, which are refused whole, and what requests see of it."""

import asyncio
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.base.errors import CheckpointError, HeadraceError, InvalidRequestError, ModelNotFoundError
from headrace.executors.native_quantize import quantize_tensor
from headrace.formats.checkpoint import open_checkpoint
from headrace.llm.refit import as_served
from headrace.numerics.quantize import quantize
from headrace.numerics.schemes import Float8Scheme, IntegerScheme
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import quantized
from tests.support.tiny_model import write_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture
def paths(tmp_path):
    return [write_model(tmp_path / str(seed), seed=seed) for seed in range(3)]


def answer(llm):
    return llm.generate("abc", GREEDY)[0].outputs[0]


def answers_of(paths, **options):
    found = []
    for path in paths:
        with LLM(path, max_num_seqs=2, **options) as llm:
            found.append(answer(llm).token_ids)
    assert len({tuple(tokens) for tokens in found}) == len(found), "each model says something else"
    return found


@pytest.mark.parametrize("options", [{}, {"executor": "torch"}, {"weight_format": "bf16"}], ids=str)
def test_updates_and_the_way_back(paths, options):
    expected = answers_of(paths, **options)
    with LLM(paths[0], max_num_seqs=2, **options) as llm:
        assert answer(llm).token_ids == expected[0]
        first = llm.update_weights(paths[1])
        assert (first.version, first.replaced, llm.weight_version) == (1, 0, 1)
        assert first.num_parameters == len(llm.model.graph.params)
        assert set(first.seconds) == {"read", "convert", "pack", "swap"}
        output = answer(llm)
        assert (output.token_ids, output.weight_versions) == (expected[1], [1] * 12)
        llm.update_weights(paths[2], version=7, keep_previous=True)
        assert answer(llm).token_ids == expected[2]
        assert llm.rollback_weights().version == 1
        output = answer(llm)
        assert (output.token_ids, output.weight_versions) == (expected[1], [1] * 12)
        with pytest.raises(InvalidRequestError, match="no previous weights"):
            llm.rollback_weights()
        with pytest.raises(InvalidRequestError, match="not above 7"):
            llm.update_weights(paths[0], version=7)
        assert llm.update_weights(paths[0]).version == 8, "a number that was given is not given to other weights"


def test_a_prefix_of_old_weights_is_never_served(paths):
    prompt = "abcdefghijklmnopqrstuvwxyz" * 2
    with LLM(paths[1], max_num_seqs=2) as llm:
        expected = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    with LLM(paths[0], max_num_seqs=2) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=1))
        llm.update_weights(paths[1])
        found = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
        assert found[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
        assert found[0].metrics.num_cached_tokens == 0


@pytest.mark.parametrize("running", ["continue", "recompute"])
def test_a_request_that_is_being_served_goes_on_and_says_which_weights_gave_what(paths, running):
    with LLM(paths[0], max_num_seqs=2) as llm:
        stream = llm.stream("abc", GREEDY)
        before = [next(stream) for _ in range(5)]
        llm.update_weights(paths[1], running=running)
        deltas = [*before, *stream]
    tokens = [token for delta in deltas for token in delta.token_ids]
    versions = [version for delta in deltas for version in delta.weight_versions]
    assert versions == [0] * 5 + [1] * 7
    with LLM(paths[1], max_num_seqs=2) as fresh:
        prompt = [*fresh.tokenizer.encode("abc"), *tokens[:5]]
        (rest,) = fresh.generate([prompt], SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True))
    assert (rest.outputs[0].token_ids == tokens[5:]) is (running == "recompute"), "old keys and values, or none"


def refused(llm, expected, error, match, *arguments, **options):
    with pytest.raises(error, match=match):
        llm.update_weights(*arguments, **options)
    output = answer(llm)
    assert (output.token_ids, set(output.weight_versions)) == (expected, {0}), "nothing has changed"


def test_what_is_not_this_model_is_refused_whole(paths, tmp_path):
    (expected,) = answers_of(paths[:1])
    lacking = write_model(tmp_path / "lacking", without=("blk.1.ffn_down.weight",), seed=1)
    more = write_model(tmp_path / "more", more=("blk.0.mystery.weight",), seed=1)
    wide = write_model(tmp_path / "wide", llama__feed_forward_length=96, seed=1)
    other = write_model(tmp_path / "q8", matrices="q8_0", seed=1)
    digest = hashlib.sha256(Path(paths[1]).read_bytes()).hexdigest()
    with LLM(paths[0], max_num_seqs=2) as llm:
        refused(llm, expected, CheckpointError, r"lacks 1 tensors.*blk\.1\.ffn_down\.weight", lacking)
        refused(llm, expected, InvalidRequestError, r"hold 1 tensors.*blk\.0\.mystery\.weight", more)
        refused(llm, expected, CheckpointError, r"blk\.0\.ffn_.*has shape", wide)
        refused(llm, expected, InvalidRequestError, "served as f32 and cannot be made of q8_0", other)
        refused(llm, expected, HeadraceError, "does not exist", str(tmp_path / "nowhere"))
        refused(llm, expected, InvalidRequestError, "Version 0 is not above 0", paths[1], version=0)
        refused(llm, expected, InvalidRequestError, "running", paths[1], running="abort")
        refused(llm, expected, InvalidRequestError, "has no digest", paths[1], sha256={})
        refused(llm, expected, InvalidRequestError, "is not there", paths[1], sha256={"tiny.gguf": digest, "x": digest})
        refused(llm, expected, InvalidRequestError, "digest", paths[1], sha256={"tiny.gguf": "0" * 64})
        assert llm.update_weights(paths[1], sha256={"tiny.gguf": digest.upper()}).version == 1


def test_tensors_by_name_with_digests(paths):
    """As a trainer sends them: this model's came from a GGUF file, a Hugging Face name is the same parameter's."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    (_, expected) = answers_of(paths[:2])
    stored = {}
    heads = {"attn_q": 2, "attn_k": 1}
    for name, tensor in open_checkpoint(paths[1]).tensors.items():
        *layer, part, _ = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        if part in heads:  # rotary pairs, as GGUF files have them
            tensor = RawTensor(tensor.format, tensor.shape, tensor.stored, heads[part])
            tensor = RawTensor.from_f32(tensor.to_f32())
        stored[f"{prefix}{names[part]}.weight"] = tensor
    digests = {name: hashlib.sha256(tensor.stored).hexdigest() for name, tensor in stored.items()}
    with LLM(paths[0], max_num_seqs=2) as llm:
        llm.update_weights(stored, sha256=digests)
        assert answer(llm).token_ids == expected
        with pytest.raises(InvalidRequestError, match=r"model\.norm\.weight has the SHA-256"):
            llm.update_weights(stored, sha256={**digests, "model.norm.weight": "0" * 64})


def test_plain_formats_and_schemes():
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    master = quantized(values, "bf16")
    assert as_served("w", master, master) is master
    np.testing.assert_array_equal(as_served("w", master, RawTensor.from_f32(values)).to_f32(), master.to_f32())
    np.testing.assert_array_equal(as_served("w", RawTensor.from_f32(values), master).data, master.data)
    for scheme in (IntegerScheme(), IntegerScheme(symmetric=False, scale="f16"), IntegerScheme(bits=8, group_size=0)):
        served = quantize_tensor(RawTensor.from_f32(values), scheme)
        made = as_served("w", master, served)
        assert made.format == served.format
        np.testing.assert_array_equal(made.data, RawTensor.from_groups(quantize(master.to_f32(), scheme)).data)
    for unknown in (RawTensor.from_groups(quantize(values, Float8Scheme())), quantized(values, "q4_1")):
        with pytest.raises(InvalidRequestError, match="w is served as"):
            as_served("w", master, unknown)


def test_one_update_at_a_time(paths, monkeypatch):
    with LLM(paths[0], max_num_seqs=2) as llm:
        go, reached = threading.Event(), threading.Event()
        stage = llm._executor.stage_weights

        def slow(weights):
            reached.set()
            assert go.wait(10)
            return stage(weights)

        monkeypatch.setattr(llm._executor, "stage_weights", slow)
        thread = threading.Thread(target=llm.update_weights, args=(paths[1],))
        thread.start()
        assert reached.wait(10)
        with pytest.raises(InvalidRequestError, match="Another weight update"):
            llm.update_weights(paths[2])
        assert len(answer(llm).token_ids) == 12, "requests run meanwhile"
        go.set()
        thread.join(10)
        assert llm.weight_version == 1


def test_a_closed_model_takes_no_weights(paths):
    llm = LLM(paths[0], max_num_seqs=2)
    llm.close()
    with pytest.raises(HeadraceError, match="closed"):
        llm.update_weights(paths[1])


def test_async_updates_under_traffic(paths):
    """Streams run throughout; every output is whole, its versions only rise, and the last weights answer as they do."""
    expected = answers_of(paths)

    async def main():
        async with AsyncLLM(paths[0], max_num_seqs=4) as llm:
            stop = asyncio.Event()
            outputs = []

            async def client():
                while not stop.is_set():
                    outputs.append((await llm.generate("abc", GREEDY)).outputs[0])

            async def answered(more):
                wanted = len(outputs) + more
                while len(outputs) < wanted:
                    await asyncio.sleep(0.001)

            clients = [asyncio.create_task(client()) for _ in range(4)]
            await answered(1)
            for version in range(1, 13):
                update = await llm.update_weights(paths[version % 3], running="recompute", keep_previous=True)
                assert update.version == version
                with pytest.raises(ModelNotFoundError):
                    await llm.update_weights("/nonexistent")
            assert (await llm.rollback_weights()).version == 11
            await answered(5)  # the fifth began after the way back
            stop.set()
            await asyncio.gather(*clients)
            llm._runtime.engine.check_integrity()
            return outputs, (await llm.generate("abc", GREEDY)).outputs[0]

    outputs, last = asyncio.run(main())
    assert (last.token_ids, set(last.weight_versions)) == (expected[11 % 3], {11})
    assert {version for output in outputs for version in output.weight_versions} > {0, 11}
    for output in outputs:
        assert len(output.token_ids) == len(output.weight_versions) == 12
        if len(set(output.weight_versions)) == 1:
            assert output.token_ids == expected[output.weight_versions[0] % 3]
    assert answer_is_rising(outputs)


def answer_is_rising(outputs):
    """Versions within an output rise, but for the one step back at the end."""
    return all(
        all(
            b >= a or (a, b) == (12, 11)
            for a, b in zip(output.weight_versions, output.weight_versions[1:], strict=False)
        )
        for output in outputs
    )


def test_an_update_during_shutdown_ends_with_an_error(paths):
    async def main():
        llm = AsyncLLM(paths[0], max_num_seqs=2)
        await llm.start()
        await llm.aclose()
        with pytest.raises(HeadraceError, match="shutting down"):
            await llm.update_weights(paths[1])

    asyncio.run(main())
