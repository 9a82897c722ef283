"""The reference of every op, in torch: one small function each, written to be read.

An op joins the set only with its reference. The functions run on any device, write nothing in place but the KV cache,
and compute norms, softmax and rotations in float32 or wider.

Shape legend: t tokens of the ragged batch, q tokens of one sequence, s its keys, h heads, k KV heads, g = h / k,
d head_dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.engine.step import Step
from headrace.graph.ir import Node, RopeTable
from headrace.numerics.kv_cache import RoundedHeads, round_heads, widen_heads
from headrace.numerics.kv_formats import scales_per_head

_PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16}
_CODES = {"fp8": torch.uint8, "int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one attention layer.

    Attributes:
        kv_format: one of `headrace.numerics.kv_formats.KV_FORMATS`.
        keys, values: ``[num_blocks, block_size, num_kv_heads, head_dim]`` numbers or codes; int4 has two to a byte.
        scales: of the keys, of the values: ``[2, num_blocks, block_size, num_kv_heads, groups]``, float32; of int4
            bfloat16, the scales of all groups, then what their codes 0 stand for. None in a format without scales.
        head_dim: features of a head.
    """

    kv_format: str
    keys: Tensor
    values: Tensor
    scales: Tensor | None
    head_dim: int

    @classmethod
    def zeros(cls, shape: tuple[int, int, int, int], kv_format: str, device: torch.device) -> "KVCache":
        """An empty cache of ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
        *tokens, head_dim = shape
        stored = (*tokens, -(-head_dim // 2) if kv_format == "int4" else head_dim)
        dtype = _PLAIN.get(kv_format) or _CODES[kv_format]
        keys, values = (torch.zeros(stored, dtype=dtype, device=device) for _ in range(2))
        if kv_format in _PLAIN:
            return cls(kv_format, keys, values, None, head_dim)
        groups, scale_dtype = scales_per_head(kv_format, head_dim), torch.float32
        if kv_format == "int4":
            groups, scale_dtype = 2 * groups, torch.bfloat16
        scales = torch.zeros((2, *tokens, groups), dtype=scale_dtype, device=device)
        return cls(kv_format, keys, values, scales, head_dim)

    def append(self, slots: Tensor, k_tkd: Tensor, v_tkd: Tensor) -> None:
        """Round each token's keys and values to the cache's format and keep them at its slot."""
        for i, (part, x_tkd) in enumerate(((self.keys, k_tkd), (self.values, v_tkd))):
            if self.scales is None:
                part.flatten(0, 1)[slots] = x_tkd.to(part.dtype)
                continue
            heads = round_heads(x_tkd.to("cpu", torch.float32).numpy(), self.kv_format, keys=part is self.keys)
            codes, scales = heads.codes, heads.scales
            if heads.lowest is not None:
                codes, scales = _pack_nibbles(heads.codes), np.concatenate([heads.scales, heads.lowest], axis=-1)
            part.flatten(0, 1)[slots] = torch.from_numpy(codes).to(part.device)
            self.scales[i].flatten(0, 1)[slots] = torch.from_numpy(scales).to(part.device, self.scales.dtype)

    def read(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens in some blocks: both ``[tokens, num_kv_heads, head_dim]``."""
        k_skd, v_skd = (self._widened(i, blocks) for i in range(2))
        return k_skd.to(dtype), v_skd.to(dtype)

    def _widened(self, i: int, blocks: Tensor) -> Tensor:
        part = (self.keys, self.values)[i]
        stored = part[blocks].flatten(0, 1)
        if self.scales is None:
            return stored
        codes, scales = stored.cpu().numpy(), self.scales[i][blocks].flatten(0, 1).to("cpu", torch.float32).numpy()
        heads = RoundedHeads(codes, scales)
        if self.kv_format == "int4":
            heads = RoundedHeads(_unpack_nibbles(codes)[..., : self.head_dim], *np.split(scales, 2, axis=-1))
        return torch.from_numpy(widen_heads(heads, self.kv_format, keys=i == 0)).to(part.device)


def _pack_nibbles(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two neighbours to a byte, the first in its lower half; a zero after an odd number."""
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return even[..., ::2] | even[..., 1::2] << 4


def _unpack_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence of a step: its token rows ``start … end - 1`` and the blocks that hold its `context_len` tokens."""

    start: int
    end: int
    context_len: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """A step on a device.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T].
        slots: int64 [T], where each token's keys and values go: ``block * block_size + offset in block``.
        sample_rows: int64 [R].
        sequences: one entry per sequence.
        kv: one cache per attention layer.
        rotations: see `rotation`; kept for the layers behind the first.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    sequences: tuple[SequenceRows, ...]
    kv: Sequence[KVCache]
    rotations: dict[tuple[RopeTable, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of_step(cls, step: Step, kv: Sequence[KVCache], block_size: int, device: torch.device) -> "Batch":
        """Move a step's arrays to `device`; `kv` is written by the attention nodes."""
        starts = step.seq_starts.astype(np.int64)
        num_blocks = -(-step.context_lens.astype(np.int64) // block_size)
        owner = np.repeat(np.arange(len(num_blocks)), np.diff(starts))
        blocks = step.block_tables.astype(np.int64)
        slots = blocks[owner, step.positions // block_size] * block_size + step.positions % block_size

        def tensor(array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        return cls(
            token_ids=tensor(step.token_ids),
            positions=tensor(step.positions),
            slots=tensor(slots),
            sample_rows=tensor(step.sample_rows),
            sequences=tuple(
                SequenceRows(
                    int(starts[s]), int(starts[s + 1]), int(step.context_lens[s]), tensor(blocks[s, : num_blocks[s]])
                )
                for s in range(len(num_blocks))
            ),
            kv=kv,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """What one node is evaluated on: the values of its inputs and parameters, in the op's order, and the batch."""

    node: Node
    inputs: Sequence[Tensor]
    params: Sequence[Tensor]
    batch: Batch


def _at_least_f32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _split(x: Tensor, size: int) -> Tensor:
    """``[rows, features]`` as ``[rows, features / size, size]``: heads, or groups of a norm."""
    return x.reshape(x.shape[0], x.shape[1] // size, size)


def embed(call: Call) -> Tensor:
    """Rows of the table, scaled."""
    return call.params[0][call.batch.token_ids] * call.node.number("scale")


def rms_norm(call: Call) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over each run of `group` features."""
    x = _split(_at_least_f32(call.inputs[0]), call.node.integer("group"))
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + call.node.number("eps"))
    return (normed * call.params[0]).flatten(1).to(call.inputs[0].dtype)


def linear(call: Call) -> Tensor:
    """``x Wᵀ + b`` for each part, side by side."""
    parts = call.node.integer("parts")
    weights, biases = call.params[:parts], call.params[parts:] if call.node.attrs["bias"] else [None] * parts
    return torch.cat([F.linear(call.inputs[0], w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)


def slice_columns(call: Call) -> Tensor:
    """Columns ``start … start + size - 1``."""
    return call.inputs[0].narrow(-1, call.node.integer("start"), call.node.integer("size"))


def add(call: Call) -> Tensor:
    """Elementwise sum."""
    return call.inputs[0] + call.inputs[1]


def glu(call: Call) -> Tensor:
    """``activation(gate) * up`` (GLU variants: arXiv:2002.05202)."""
    gate, up = call.inputs
    return (F.silu(gate) if call.node.text("activation") == "silu" else F.gelu(gate, approximate="tanh")) * up


def rope(call: Call) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864), "half" layout; the features after `rotary_dim` pass through."""
    return rotate(call, *rotation(call))


def rotation(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which a `rope` node turns, each ``[t, rotary_dim / 2]`` in `dtype`.

    In float64, since at long positions a float32 product would already be off by 1e-3 radians.
    """
    table, batch = call.node.rope(), call.batch
    if (table, dtype) not in batch.rotations:
        angles_tf = batch.positions[:, None].to(dtype) * _frequencies(table, dtype, batch.positions.device)
        batch.rotations[table, dtype] = torch.cos(angles_tf) * table.scale, torch.sin(angles_tf) * table.scale
    return batch.rotations[table, dtype]


@cache  # recorded kernels go on reading them
def _frequencies(table: RopeTable, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to a device once: each copy waits for what is under way there."""
    with torch.inference_mode(False):
        return torch.tensor(table.inv_freq, dtype=dtype, device=device)


def rotate(call: Call, cos_tf: Tensor, sin_tf: Tensor) -> Tensor:
    """What `rope` makes with given cosines and sines."""
    table = call.node.rope()
    x_thd = _split(_at_least_f32(call.inputs[0]), call.node.integer("head_dim"))
    cos, sin = (factor[:, None].to(x_thd.dtype) for factor in (cos_tf, sin_tf))
    half = table.rotary_dim // 2
    first, second, rest = torch.split(x_thd, [half, half, x_thd.shape[-1] - 2 * half], dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return rotated.flatten(1).to(call.inputs[0].dtype)


def attention(call: Call) -> Tensor:
    """Causal grouped-query attention over the paged cache, after appending this step's keys and values to it."""
    head_dim = call.node.integer("head_dim")
    q_thd, k_tkd, v_tkd = (_split(x, head_dim) for x in call.inputs)
    cache = call.batch.kv[call.node.integer("layer")]
    cache.append(call.batch.slots, k_tkd, v_tkd)
    outputs = [
        _attend(call.node, q_thd[seq.start : seq.end], call.batch.positions[seq.start : seq.end], seq, cache)
        for seq in call.batch.sequences
    ]
    return torch.cat(outputs).flatten(1)


def _attend(node: Node, q_qhd: Tensor, positions: Tensor, seq: SequenceRows, cache: KVCache) -> Tensor:
    """One sequence's queries against its cached keys: ``[q, h, d]``."""
    k_skd, v_skd = (x_skd[: seq.context_len] for x_skd in cache.read(seq.blocks, q_qhd.dtype))
    num_kv_heads = node.integer("num_kv_heads")
    q_qkgd = q_qhd.reshape(len(q_qhd), num_kv_heads, node.integer("num_heads") // num_kv_heads, -1)
    scores_kgqs = torch.einsum("qkgd,skd->kgqs", q_qkgd, k_skd) * node.number("scale")
    key_positions = torch.arange(seq.context_len, device=positions.device)
    visible_qs = key_positions <= positions[:, None]
    if window := node.integer("window"):
        visible_qs &= key_positions > positions[:, None] - window
    weights = _at_least_f32(scores_kgqs).masked_fill(~visible_qs, -torch.inf).softmax(dim=-1)
    return torch.einsum("kgqs,skd->qkgd", weights.to(v_skd.dtype), v_skd).flatten(1, 2)


def select_rows(call: Call) -> Tensor:
    """The rows that the step samples."""
    return call.inputs[0][call.batch.sample_rows]


ReferenceOp = Callable[[Call], Tensor]

REFERENCE_OPS: Mapping[str, ReferenceOp] = {
    "embed": embed,
    "rms_norm": rms_norm,
    "linear": linear,
    "slice": slice_columns,
    "add": add,
    "glu": glu,
    "rope": rope,
    "attention": attention,
    "select_rows": select_rows,
}
"""One entry for each key of `headrace.graph.ops.OPS`."""
