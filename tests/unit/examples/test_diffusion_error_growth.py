"""The parts of the example: images and patches, rounding, and errors whose growth is known."""

from xml.etree import ElementTree

import pytest
import torch

from examples.diffusion_error_growth.digits import Judge, Quality, digits, frechet_distance
from examples.diffusion_error_growth.dit import DiT
from examples.diffusion_error_growth.drift import Samples, drift, final_errors_by_window, pushes
from examples.diffusion_error_growth.flow import trajectory
from examples.diffusion_error_growth.picture import Line, Panel, panels_svg
from examples.diffusion_error_growth.settings import KINDS, SETTINGS, rounded

N = 20


class Shrinking(torch.nn.Module):
    """A velocity of -rate · x and a constant: Euler's method takes any difference to (1 - rate / n) of it each step."""

    def __init__(self, rate, shift=0.0):
        super().__init__()
        self.rate, self.shift = rate, shift

    def forward(self, images, times, labels):
        return self.shift - self.rate * images


class SignJudge:
    """Sees a 1 where an image is bright, else a 0."""

    def read(self, images):
        return (images.mean((1, 2)) > 0).long()

    def quality(self, images, labels):
        return Quality((self.read(images) == labels).float().mean().item(), 0.0)


@pytest.fixture
def samples():
    return Samples(torch.randn(80, 8, 8), torch.zeros(80, dtype=torch.int64), SignJudge())


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = DiT(width=32, depth=2)
    for parameter in made.parameters():  # a new one gives zero: its gates and its head are
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def test_a_new_model_gives_zero_and_pixels_stay_where_they_are():
    images = torch.randn(3, 8, 8)
    model = DiT(width=32, depth=1)
    assert not model(images, torch.rand(3), torch.arange(3)).any()
    with torch.no_grad():  # four features that are the patch's pixels, and a head that reads them back
        model.positions.zero_()
        model.patch.bias.zero_()
        model.patch.weight.zero_()
        model.patch.weight[:4] = torch.eye(4)
        model.patch.weight[4:8] = -torch.eye(4)  # so that the norm's mean is zero
        model.head.weight[:, :4] = torch.eye(4)
    found = model(images, torch.rand(3), torch.arange(3))
    patches = images.reshape(3, 4, 2, 4, 2)
    square = patches.square().mean((2, 4), keepdim=True).mul(8 / 32)
    size = square.add(1e-5).sqrt().expand_as(patches).reshape(3, 8, 8)  # layer_norm's default epsilon
    torch.testing.assert_close(found, images / size)


def test_rounding_orders_by_bits_and_leaves_the_ends(model):
    images, times, labels = torch.randn(8, 8, 8), torch.rand(8), torch.arange(8)
    errors = {}
    for setting in SETTINGS:
        made = rounded(model, setting)
        assert torch.equal(made.head.weight, model.head.weight)
        assert torch.equal(made.patch.weight, model.patch.weight)
        errors[setting.title] = (made(images, times, labels) - model(images, times, labels)).norm().item()
    assert errors["weights int4-g32"] > errors["weights fp8-channel"] > errors["weights int8-channel"]
    assert errors["weights int8-channel"] > errors["weights bf16"] > 0
    assert errors["activations int8"] > errors["activations bf16"] > 0


def test_kinds_of_layers_are_all_layers_once(model):
    names = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    int4 = next(setting for setting in SETTINGS if setting.weights == "int4-g32")
    changed = []
    for only in KINDS.values():
        made = rounded(model, int4, only)
        changed += [n for n in names if not torch.equal(made.get_submodule(n).weight, model.get_submodule(n).weight)]
    assert sorted(changed) == sorted(names - {"patch", "head"})


def test_euler_is_exact_where_the_velocity_is_constant(samples):
    states = trajectory([Shrinking(0.0, 3.0)] * 7, samples.noise, samples.labels)
    assert len(states) == 8
    torch.testing.assert_close(states[-1], samples.noise + 3)


def test_a_constant_error_is_forgiven_where_the_flow_contracts(samples):
    """Each of n errors of d / n shrinks by the steps after it: a geometric sum, against d if they only added up."""
    exact, other = Shrinking(2.0), Shrinking(2.0, 0.1)
    states = trajectory([exact] * N, samples.noise, samples.labels)
    found = drift(other, samples, states)
    left = sum((1 - 2 / N) ** k for k in range(N)) / N
    assert found.error[0] == found.added[0] == 0
    assert found.error[-1] / found.added[-1] == pytest.approx(left, rel=1e-4)
    assert (found.same_digit, found.accuracy) == judged(states[-1], left / 10)
    early, late = final_errors_by_window(exact, other, samples, states, 2)
    assert early / late == pytest.approx((1 - 2 / N) ** (N // 2), rel=1e-4)


def judged(exact, brighter):
    """What the judge keeps of its readings if all pixels get brighter; and the share of zeros."""
    before, after = ((exact + shift).mean((1, 2)) > 0 for shift in (0, brighter))
    return pytest.approx(((before == after).float().mean().item(), (~after).float().mean().item()))


def test_a_push_shrinks_or_grows_as_the_flow_says(samples):
    for rate in (2.0, -1.0):
        exact = Shrinking(rate)
        states = trajectory([exact] * N, samples.noise, samples.labels)
        errors = torch.ones_like(states)
        for push in pushes(exact, samples, states, errors, torch.randn(90, 8, 8), (0, 10)):
            gain = (1 - rate / N) ** (N - round(push.start * N))
            for found in (push.random, push.bright, push.dim, push.quantized, push.far):
                assert found == pytest.approx(gain, rel=2e-3)


def test_the_distance_of_two_gaussians():
    torch.manual_seed(0)
    a = torch.randn(4000, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 0])) == pytest.approx(9, rel=1e-4)
    assert frechet_distance(a, 2 * a) == pytest.approx(3, rel=0.05)  # (2 - 1)² in each of three directions


def test_the_judge_reads_digits_it_has_not_seen():
    data = digits("cpu")
    judge = Judge(data, steps=300)
    assert judge.quality(data.held_out_images, data.held_out_labels).accuracy > 0.93
    assert len(data.images) + len(data.held_out_images) == 1797


def test_a_picture_has_every_line_and_leaves_out_what_has_no_logarithm():
    lines = [Line("a < b", [0, 1, 2], [0.0, 0.1, 10.0]), Line("c", [0, 1, 2], [1.0, 1.0, 1.0])]
    drawn = ElementTree.fromstring(panels_svg([Panel("one", "x", lines), Panel("two", "x", lines, is_share=True)]))
    points = [each.get("points").split() for each in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(each) for each in points] == [2, 3, 3, 3]
