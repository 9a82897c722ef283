"""Training on a GPU: the same code, the same bits each time, and a model that packs to what training saw."""

from contextlib import closing

import numpy as np
import pytest
import torch

from headrace.align.forced import forced_logits
from headrace.compress.recipe import Recipe
from headrace.executors.torch_device import repeatable
from headrace.executors.torch_executor import TorchExecutor
from headrace.train.data import Sequences
from headrace.train.gradients import Gradients
from headrace.train.loop import TrainingConfig, train
from headrace.train.model import GraphModel
from headrace.train.qat import packed
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

pytestmark = pytest.mark.gpu

GRAPH = tiny_llama()
WEIGHTS = random_weights(GRAPH)
SCHEMES = Recipe(format="int4-g32").schemes(GRAPH)
BATCHES = Sequences(np.random.default_rng(0).integers(0, VOCAB, (32, 16))).batches(4, seed=0)


def trained(folder, *, device="cuda", compute="f32", stop_at=None, **options):
    model = GraphModel(GRAPH, WEIGHTS, SCHEMES, device=device, **options)
    teacher = GraphModel(GRAPH, WEIGHTS, {}, device=device).requires_grad_(False)
    config = TrainingConfig(steps=12, batch_size=4, learning_rate=3e-4, compute=compute, checkpoint_every=5)
    losses = []

    def report(step, figures):
        losses.append(figures["loss"])
        if step == stop_at:
            raise KeyboardInterrupt

    if stop_at is None:
        train(model, teacher, BATCHES, config, folder, report=report)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(model, teacher, BATCHES, config, folder, report=report)
    return model, losses


def test_a_gpu_learns_what_the_cpu_learns(tmp_path):
    _, on_gpu = trained(tmp_path / "gpu")
    _, on_cpu = trained(tmp_path / "cpu", device="cpu")
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=2e-2)
    assert np.mean(on_gpu[-3:]) < 0.7 * on_gpu[0]


@pytest.mark.parametrize("compute", ["f32", "bf16"])
def test_two_runs_and_a_stopped_one_end_with_the_same_bits(tmp_path, compute):
    whole, _ = trained(tmp_path / "whole", compute=compute)
    again, _ = trained(tmp_path / "again", compute=compute, checkpointed=True)
    trained(tmp_path / "stopped", compute=compute, stop_at=7)
    resumed, losses = trained(tmp_path / "stopped", compute=compute)
    assert len(losses) == 7, "from the checkpoint on"
    for name in GRAPH.params:
        assert torch.equal(again.master(name), whole.master(name)), name
        assert torch.equal(resumed.master(name), whole.master(name)), name


@pytest.mark.parametrize("scheme", ["int4-g32", "mxfp4"])
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_replayed_gradients_are_those_of_kernels_started_one_by_one(scheme, distilled, checkpointed):
    schemes = Recipe(format=scheme).schemes(GRAPH)
    model = GraphModel(GRAPH, WEIGHTS, schemes, device="cuda", checkpointed=checkpointed)
    teacher = GraphModel(GRAPH, WEIGHTS, {}, device="cuda").requires_grad_(False) if distilled else None
    recorded = Gradients(model, teacher, compute="bf16")
    with repeatable(model.device):
        for step in range(3):
            loss = float(recorded(BATCHES(step)))
            replayed = {name: model.master(name).grad.clone() for name in GRAPH.params}
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            model.zero_grad(set_to_none=True)
            started = Gradients(model, teacher, compute="bf16")._run(torch.from_numpy(BATCHES(step)).cuda())
            assert loss == float(started)
            for name, gradient in replayed.items():
                assert torch.equal(model.master(name).grad, gradient), name


def test_what_a_gpu_trained_is_packed_to_what_it_saw(tmp_path):
    model, _ = trained(tmp_path)
    ids = BATCHES(0)
    with torch.no_grad():
        found = model(torch.from_numpy(ids).cuda()).cpu().numpy().reshape(4, 16, VOCAB)
    with closing(TorchExecutor(GRAPH, packed(model.weights(), SCHEMES), num_blocks=8)) as executor:
        for i in range(4):
            np.testing.assert_allclose(found[i], forced_logits(executor, "logits", ids[i].tolist()), atol=2e-4)
