"""The example of two kinds of error growth, in its small setting: what it measures is in the order that it must be."""

import json
import pathlib
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
BY_BITS = ("weights bf16", "weights int8-channel", "weights int4-g32")


@pytest.mark.timeout(600)
def test_its_figures_are_in_order(tmp_path):
    target, picture, weights = (tmp_path / name for name in ("all.json", "growth.svg", "dit.pt"))
    command = [sys.executable, "-m", "examples.diffusion_error_growth", "--small", "--weights", weights]
    command += ["--json", target, "--svg", picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(title in done.stdout for title in BY_BITS)
    found = json.loads(target.read_text())
    check_diffusion(found["diffusion"])
    check_language(found["language"])
    assert len(torch.load(weights)["losses"]) == 150
    drawn = ElementTree.fromstring(picture.read_text())
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 4 * len(BY_BITS) + 4 + 2


def check_diffusion(found):
    assert found["loss_last"] < 0.6 * found["loss_first"]
    for finals in found["finals"].values():
        assert 0 < finals[BY_BITS[0]] < finals[BY_BITS[1]] < finals[BY_BITS[2]] < 1
    drifts = [found["drifts"][title] for title in BY_BITS]
    assert all(each["error"][0] == 0 for each in drifts)
    assert all(a["velocity"][i] < b["velocity"][i] for a, b in pairwise(drifts) for i in range(len(a["velocity"])))
    whole = drifts[-1]["error"][-1]
    assert all(0 < part < whole for part in found["windows"])
    assert all(0 < part < whole for part in found["kinds"].values())


def check_language(found):
    growths = [found["growths"][title] for title in BY_BITS]
    assert all(10 * a["kl_mean"] < b["kl_mean"] for a, b in pairwise(growths))
    for name in ("greedy_agreement", "sampled_agreement", "best_agreement"):
        curves = [each[name] for each in growths]
        assert all(later <= before for curve in curves for before, later in pairwise(curve))
        assert all(sum(a) > sum(b) for a, b in pairwise(curves)), name
    one = found["one_token"]
    assert one["kl_same_words"][-1] < one["kl_same_words"][0] / 4
    assert one["kl_own_words"][-1] > 10 * one["kl_same_words"][-1]
    first, last = found["windows"]
    assert last[0] < 1e-6, "what was read before the rounding cannot know of it"
    assert 0 < first[1] < first[0], "later tokens inherit less than there was"
