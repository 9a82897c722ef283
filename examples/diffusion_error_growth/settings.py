"""What is rounded, alike in both kinds of model: weights to schemes of `headrace.numerics`, or what linears read."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from examples.diffusion_error_growth.dit import DiT
from headrace.align.subjects import Subject
from headrace.executors.native_isa import isa_rounding_inputs
from headrace.numerics.fake_quantize import fake_quantize
from headrace.numerics.schemes import WHOLE, IntegerScheme, scheme_named

EXACT = Subject(activation="f32", kv="f32")
"""The language model that others are compared with: its stored weights, everything else in f32."""
_LEFT = ("patch", "head")  # as a language model's embedding and logits are left
_INT8_ROWS = IntegerScheme(bits=8, group_size=WHOLE, scale="f32")


@dataclass(frozen=True, slots=True)
class Setting:
    """A format of weights (a scheme's name, ``bf16``, or empty) and one of what linears read (``bf16``, ``int8``)."""

    title: str
    weights: str = ""
    activation: str = ""

    @property
    def subject(self) -> Subject:
        """The language model in it. Its int8 activations are scaled in groups of the stored matrix, as without AMX."""
        activation = self.activation or "f32"
        isa = isa_rounding_inputs(activation) or ""
        return replace(EXACT, weights=self.weights or "stored", activation=activation, isa=isa)


SETTINGS = (
    Setting("weights bf16", weights="bf16"),
    Setting("weights int8-channel", weights="int8-channel"),
    Setting("weights fp8-channel", weights="fp8-channel"),
    Setting("weights int4-g32", weights="int4-g32"),
    Setting("activations bf16", activation="bf16"),
    Setting("activations int8", activation="int8"),
)
KINDS = {
    "attention": ("*.attention.*",),
    "MLP": ("*.mlp.*",),
    "adaLN modulation": ("*modulation",),
    "time embedding": ("time.*",),
}
"""Of a DiT's linear layers, by patterns of their names."""


@torch.no_grad()
def rounded(model: DiT, setting: Setting, only: Sequence[str] = ("*",)) -> DiT:
    """A copy of a DiT with those linear layers, of all but the first and the last, in a setting."""
    made = copy.deepcopy(model)
    for name, layer in made.named_modules():
        if not isinstance(layer, nn.Linear) or name in _LEFT or not any(fnmatchcase(name, each) for each in only):
            continue
        layer.weight.copy_(_rounded_weight(layer.weight, setting.weights))
        if setting.activation:
            layer.register_forward_pre_hook(_READ[setting.activation])
    return made


def _rounded_weight(weight: Tensor, format_name: str) -> Tensor:
    if format_name in ("", "bf16"):
        return weight.bfloat16().float() if format_name else weight
    return fake_quantize(weight, scheme_named(format_name))


def _read_bf16(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].bfloat16().float(),)


def _read_int8(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (fake_quantize(inputs[0].flatten(0, -2), _INT8_ROWS).view_as(inputs[0]),)


_READ = {"bf16": _read_bf16, "int8": _read_int8}
