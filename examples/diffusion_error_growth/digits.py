"""The images to learn (scikit-learn's 1,797 handwritten digits), and a judge of what a model draws."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

_HELD_OUT = 360


@dataclass(frozen=True, slots=True)
class Digits:
    """Images, float32 ``[n, 8, 8]`` in [-1, 1], and what they show, int64 ``[n]``; 360 of a shuffle are held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def digits(device: str) -> Digits:
    """From scikit-learn itself: nothing is downloaded."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.tensor(found.images[order] / 8 - 1, dtype=torch.float32, device=device)
    labels = torch.tensor(found.target[order], dtype=torch.int64, device=device)
    return Digits(images[:-_HELD_OUT], labels[:-_HELD_OUT], images[-_HELD_OUT:], labels[-_HELD_OUT:])


@dataclass(frozen=True, slots=True)
class Quality:
    """How often samples show the digit asked for, and how far their features' distribution is from held-out digits'."""

    accuracy: float
    frechet: float


class Judge:
    """A classifier, trained on the digits, whose 32 features before its last layer are what distances are taken in."""

    def __init__(self, data: Digits, *, steps: int = 1500) -> None:
        torch.manual_seed(1)
        self._features = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self._classes = nn.Linear(32, 10)
        self._net = nn.Sequential(self._features, self._classes).to(data.images.device)
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=2e-3, weight_decay=0.05)
        for _ in range(steps):
            rows = torch.randint(len(data.images), (128,), device=data.images.device)
            noisy = data.images[rows] + 0.1 * torch.randn_like(data.images[rows])
            loss = nn.functional.cross_entropy(self._net(noisy), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self._net.requires_grad_(False)
        self._held_out = self._features(data.held_out_images)

    def read(self, images: Tensor) -> Tensor:
        """The digits that it sees, int64 ``[b]``."""
        return self._net(images).argmax(-1)

    def quality(self, images: Tensor, labels: Tensor) -> Quality:
        """Of samples, ``[b, 8, 8]``, that were to show `labels`. The distance wants some hundreds of them."""
        right = self.read(images) == labels
        return Quality(right.float().mean().item(), frechet_distance(self._features(images), self._held_out))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians of two sets of features, ``[n, features]`` (the FID's formula, arXiv:1706.08500)."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + cov_a.trace() + cov_b.trace() - 2 * cross)
