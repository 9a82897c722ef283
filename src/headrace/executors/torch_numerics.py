"""The reference ops as others compute them: each option is one way in which real implementations round or sum.

Engines and trainers of one model differ in such choices, and their log-probabilities with them. With one option at a
time beside the exact reference, each choice's share can be measured (`headrace.align`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.base.errors import InvalidRequestError
from headrace.executors.torch_ops import REFERENCE_OPS, Call, ReferenceOp, linear, rotate, rotation
from headrace.numerics.fake_quantize import fake_quantize
from headrace.numerics.schemes import scheme_named

EXACT = "exact"
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "rope": (EXACT, "f32", "bf16"),
    "norm": (EXACT, "bf16"),
    "logits": (EXACT, "rounded", "bf16"),
    "sums": (EXACT, "split4", "reversed"),
    "residual": (EXACT, "add", "layer"),
}
"""The options that are one of a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """How ops are computed where it is not as the reference does; ``exact`` is as it does.

    Attributes:
        rope: ``f32``: angles are a float32 product, as in most engines; ``bf16``: cosines and sines rounded to it.
        norm: ``bf16``: every step of RMS norms rounded to it.
        logits: ``rounded``: logits rounded to bf16; ``bf16``: their matrix product in bf16.
        sums: of matrix products, ``split4``: four parts of the sum added up at the end, as split-K kernels do;
            ``reversed``: from the last term to the first.
        residual: ``add``: the residual stream rounded to bf16 after each addition; ``layer``: at a layer's end.
        inputs: a format that what linear layers read, but for the logits', is rounded to, token by token: ``bf16``, or
            a scheme's name (`headrace.numerics.schemes.scheme_named`; a channel is a token).
        inputs_of: a shell-style pattern of the names of the nodes that `inputs` is for.
    """

    rope: str = EXACT
    norm: str = EXACT
    logits: str = EXACT
    sums: str = EXACT
    residual: str = EXACT
    inputs: str = EXACT
    inputs_of: str = "*"

    def __post_init__(self) -> None:
        for name, known in VARIANTS.items():
            if getattr(self, name) not in known:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not known.", f"Use one of {', '.join(known)}."
                )
        if self.inputs not in (EXACT, "bf16"):
            scheme_named(self.inputs)
        if self.inputs_of != "*" and self.inputs == EXACT:
            raise InvalidRequestError(
                f"inputs_of={self.inputs_of!r} has no format to be for.", "Give inputs=int8-channel, say."
            )

    @property
    def is_exact(self) -> bool:
        """Whether all is as the reference does it."""
        return all(getattr(self, each.name) == each.default for each in fields(Numerics))


def ops_with(numerics: Numerics, output: str) -> Mapping[str, ReferenceOp]:
    """An op for each key of `REFERENCE_OPS`.

    Args:
        numerics: what differs from the reference.
        output: name of the node that makes the logits.
    """
    changed: dict[str, ReferenceOp] = {}
    if numerics.rope != EXACT:
        changed["rope"] = partial(_rope, numerics.rope)
    if numerics.norm != EXACT:
        changed["rms_norm"] = _bf16_norm
    if numerics.residual != EXACT:
        changed["add"] = partial(_add, numerics.residual)
    if (numerics.logits, numerics.sums, numerics.inputs) != (EXACT, EXACT, EXACT):
        changed["linear"] = partial(_linear, numerics, output)
    return {**REFERENCE_OPS, **changed}


def _rope(variant: str, call: Call) -> Tensor:
    if variant == "bf16":
        cos, sin = rotation(call)
        return rotate(call, _to_bf16(cos), _to_bf16(sin))
    return rotate(call, *rotation(call, torch.float32))


def _bf16_norm(call: Call) -> Tensor:
    x = call.inputs[0].to(torch.bfloat16)
    x = x.reshape(len(x), -1, call.node.integer("group"))
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + call.node.number("eps"))
    return (normed * call.params[0].to(torch.bfloat16)).flatten(1).to(call.inputs[0].dtype)


def _add(variant: str, call: Call) -> Tensor:
    total = call.inputs[0] + call.inputs[1]
    return _to_bf16(total) if variant == "add" or call.node.name.endswith(".mlp_add") else total


def _linear(numerics: Numerics, output: str, call: Call) -> Tensor:
    if call.node.name == output:
        return _logits(numerics, call)
    if numerics.inputs != EXACT and fnmatchcase(call.node.name, numerics.inputs_of):
        call = replace(call, inputs=[_rounded(call.inputs[0], numerics.inputs)])
    return _summed(numerics.sums, call)


def _logits(numerics: Numerics, call: Call) -> Tensor:
    dtype = call.inputs[0].dtype
    if numerics.logits == "bf16":
        call = replace(
            call,
            inputs=[x.to(torch.bfloat16) for x in call.inputs],
            params=[param.to(torch.bfloat16) for param in call.params],
        )
    made = _summed(numerics.sums, call).to(dtype)
    return _to_bf16(made) if numerics.logits == "rounded" else made


def _summed(variant: str, call: Call) -> Tensor:
    """`linear`, its sums taken in another order."""
    if variant == EXACT:
        return linear(call)
    parts, x = call.node.integer("parts"), call.inputs[0]
    made = []
    for i, weight in enumerate(call.params[:parts]):
        if variant == "reversed":
            y = F.linear(x.flip(-1), weight.flip(-1))
        else:
            y, *others = (F.linear(a, b) for a, b in zip(x.chunk(4, -1), weight.chunk(4, -1), strict=True))
            for other in others:
                y = y + other
        made.append(y + call.params[parts + i] if call.node.attrs["bias"] else y)
    return torch.cat(made, dim=-1)


def _to_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _rounded(x: Tensor, scheme: str) -> Tensor:
    """A matrix in a format and back, each row by itself."""
    return _to_bf16(x) if scheme == "bf16" else fake_quantize(x.float(), scheme_named(scheme)).to(x.dtype)
