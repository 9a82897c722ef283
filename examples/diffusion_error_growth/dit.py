"""A diffusion transformer small enough to train here: DiT with adaLN-zero (arXiv:2212.09748), for 8×8 images of digits.

It predicts the velocity of a straight path from noise to data (flow matching, arXiv:2210.02747; rectified flow,
arXiv:2209.03003): x_t = (1 - t) · noise + t · image, so its target is image - noise and t runs from 0 (noise) to 1.
Shape suffixes: b images, n patches, d features, h heads.
"""

import math

import torch
from torch import Tensor, nn

SIDE, PATCH, CLASSES = 8, 2, 10
_FREQUENCIES = 64


class DiT(nn.Module):
    """Velocities of images that are partly noise, given how far along they are and what they are to show."""

    def __init__(self, *, width: int = 96, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, width)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.time = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, PATCH * PATCH)
        for layer in (self.last_modulation, self.head):
            _zero(layer)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Velocities, float32 ``[b, 8, 8]``, for such images, times ``[b]`` in [0, 1] and int64 labels ``[b]``."""
        x_bnd = self.patch(_patches(images)) + self.positions
        condition_bd = nn.functional.silu(self.time(_waves(times)) + self.label(labels))
        for block in self.blocks:
            x_bnd = block(x_bnd, condition_bd)
        shift, scale = self.last_modulation(condition_bd)[:, None].chunk(2, -1)
        return _image(self.head(_modulated(x_bnd, shift, scale)))


class Block(nn.Module):
    """Attention and MLP, each between a shift and a scale of its normed input and a gate, all read off the condition.

    The modulation starts at zero, so a new block passes on what it gets ("adaLN-zero").
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        _zero(self.modulation)

    def forward(self, x_bnd: Tensor, condition_bd: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_bd)[:, None].chunk(6, -1)
        x_bnd = x_bnd + gate1 * self.attention(_modulated(x_bnd, shift1, scale1))
        return x_bnd + gate2 * self.mlp(_modulated(x_bnd, shift2, scale2))


class Attention(nn.Module):
    """Every patch to every patch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_bnd: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_bnd).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def _modulated(x_bnd: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return nn.functional.layer_norm(x_bnd, x_bnd.shape[-1:]) * (1 + scale) + shift


def _waves(times: Tensor) -> Tensor:
    """Sines and cosines of times in [0, 1], ``[b, 64]``, as DiT's of a thousand steps."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(_FREQUENCIES // 2, device=times.device) / (_FREQUENCIES // 2))
    angles = 1000 * times[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def _patches(images: Tensor) -> Tensor:
    rows = images.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3)  # [b, row, column, y, x]
    return rows.flatten(3).flatten(1, 2)


def _image(patches: Tensor) -> Tensor:
    rows = patches.unflatten(2, (PATCH, PATCH)).unflatten(1, (SIDE // PATCH, -1))
    return rows.transpose(2, 3).flatten(1, 2).flatten(2)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
