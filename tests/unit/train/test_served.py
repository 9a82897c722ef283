"""The trainer's log-probabilities against the engine's: no gap at all, while weights change."""

import numpy as np
import pytest
import torch

from headrace import LLM, SamplingParams
from headrace.base.errors import InvalidRequestError
from headrace.compress.export import hf_tensors
from headrace.compress.gate import Thresholds
from headrace.compress.pipeline import Judging, open_source, quantize_model
from headrace.compress.recipe import Recipe
from headrace.llm.config import LLMConfig
from headrace.models import sources
from headrace.train.model import GraphModel
from headrace.train.served import ServedLogprobs
from tests.support.tiny_model import write_model

SAMPLED = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True, logprobs=0, n=3, seed=5)


@pytest.fixture(params=["bf16", "int4"])
def folder(request, tmp_path):
    path = write_model(tmp_path, matrices="bf16")
    if request.param == "bf16":
        return path
    anything = Judging(
        length=48, calibration_texts=2, held_out_texts=2, thresholds=Thresholds(kl=None, flips=None, perplexity=None)
    )
    quantize_model(path, tmp_path / "int4", Recipe(), anything, command=[], progress=lambda name: None)
    return str(tmp_path / "int4")


def trained_copy(folder):
    source = open_source(folder)
    schemes = Recipe().schemes(source.graph) if folder.endswith("int4") else {}
    return source, GraphModel(source.graph, source.weights, schemes)


@pytest.mark.parametrize("options", [{}, {"activation": "int8", "kv_format": "int8"}], ids=str)
def test_there_is_no_gap_while_weights_change(folder, options):
    source, model = trained_copy(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = LLMConfig.of({"max_num_seqs": 8, **options})
    gradients = []
    with LLM(folder, max_num_seqs=8, **options) as llm:
        served = ServedLogprobs(model, llm.model, config, max_len=40)
        for version in range(4):
            (result,) = llm.generate("abcab", SAMPLED)
            loss = torch.zeros(())
            for output in result.outputs:
                assert set(output.weight_versions) == {version}
                ids = [*result.prompt_token_ids, *output.token_ids]
                found = served(ids)[-len(output.token_ids) :]
                said = np.array([entry.logprob for entry in output.logprobs], np.float32)
                np.testing.assert_array_equal(found.detach().numpy(), said)
                loss = loss - found.mean()
            optimizer.zero_grad()
            loss.backward()
            gradients.append(model.master("layers.0.mlp.up.weight").grad.abs().sum())
            optimizer.step()
            served.refresh()
            llm.update_weights(masters(source, model))
        served.close()
    assert all(gradient > 0 for gradient in gradients)


def masters(source, model):
    weights = model.weights()
    return {where.name: weights[name] for name, where in sources(source.spec, "hf").items()}


def test_without_refreshing_there_is_one(folder):
    _, model = trained_copy(folder)
    with LLM(folder, max_num_seqs=8) as llm:
        served = ServedLogprobs(model, llm.model, LLMConfig.of({}), max_len=40)
        before = served([1, 2, 3, 4, 5]).detach()
        with torch.no_grad():
            model.master("layers.0.mlp.up.weight").mul_(1.5)
        assert torch.equal(served([1, 2, 3, 4, 5]).detach(), before)
        served.refresh()
        assert not torch.equal(served([1, 2, 3, 4, 5]).detach(), before)
        served.close()


def test_an_executor_whose_bits_depend_on_batches_is_refused(folder):
    _, model = trained_copy(folder)
    with LLM(folder, max_num_seqs=2, executor="torch") as llm, pytest.raises(InvalidRequestError, match="native"):
        ServedLogprobs(model, llm.model, LLMConfig.of({"executor": "torch"}), max_len=40)


def test_masters_are_stored_by_their_names(folder):
    source, model = trained_copy(folder)
    assert hf_tensors(source.spec, model.weights()).keys() == masters(source, model).keys()
