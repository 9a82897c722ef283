from contextlib import closing

import numpy as np
import torch

from headrace.align.forced import forced_logits
from headrace.executors.torch_executor import TorchExecutor
from headrace.executors.torch_sequences import run_sequences, tokens_only
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

GRAPH = tiny_llama(num_layers=3, window=9)
WEIGHTS = random_weights(GRAPH)
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (4, 24)))


def params():
    return {name: torch.from_numpy(np.array(tensor.to_f32())).requires_grad_() for name, tensor in WEIGHTS.items()}


def run(graph, values, ids=IDS, **options):
    return run_sequences(graph, ids, lambda node, inputs: [values[name] for name in node.params], **options)


def test_each_sequence_is_what_the_executor_computes():
    found = run(GRAPH, params()).detach().numpy().reshape(4, 24, VOCAB)
    with closing(TorchExecutor(GRAPH, WEIGHTS, num_blocks=8)) as executor:
        for i in range(4):
            np.testing.assert_allclose(found[i], forced_logits(executor, "logits", IDS[i].tolist()), atol=2e-4)


def test_checkpointing_changes_no_bit_of_values_and_gradients():
    gradients = []
    for checkpointed in (False, True):
        values = params()
        output = run(GRAPH, values, checkpointed=checkpointed)
        output.square().mean().backward()
        gradients.append((output.detach(), {name: value.grad for name, value in values.items()}))
    assert torch.equal(gradients[0][0], gradients[1][0])
    for name, gradient in gradients[0][1].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][1][name]), name


def test_sequences_do_not_see_each_other():
    values = params()
    whole = run(GRAPH, values)
    assert torch.allclose(whole[:24], run(GRAPH, values, IDS[:1]), atol=1e-5)
    embedded = values["embed.weight"]
    run(GRAPH, values)[24:].sum().backward()
    only_first = [token for token in IDS[0].unique().tolist() if token not in IDS[1:]]
    assert only_first
    assert (embedded.grad[only_first] == 0).all()


def test_the_graph_up_to_where_rows_are_sampled():
    cut = tokens_only(GRAPH)
    assert "logits.weight" not in cut.params
    assert run(cut, params()).shape == (96, 64)
