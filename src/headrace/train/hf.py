"""The rounding rule on somebody else's trainer: Hugging Face models whose linear layers see their weights rounded."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from headrace.base.errors import InvalidRequestError
from headrace.numerics import fake_quantize as rule
from headrace.numerics.schemes import Scheme

HEADS = ("*lm_head*",)


class Rounded(torch.nn.Module):
    """What a parametrized weight is seen as: rounded to a scheme, with a straight-through gradient."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        """The weight rounded, in its own dtype: a bf16 master is rounded from its exact value."""
        return rule.fake_quantize(weight.float(), self.scheme).to(weight.dtype)


def fake_quantize(model: torch.nn.Module, scheme: Scheme, *, ignore: Sequence[str] = HEADS) -> list[str]:
    """Let the linear layers of a model see their weights rounded, in place; returns their names.

    The parameters stay what they are, so optimizers and trainers that take modules go on as before, TRL's among them:
    each weight is `torch.nn.utils.parametrize`d. In float32 the forward pass sees the very values that packing stores
    and the engine serves. FSDP2 comes afterwards: `fully_shard` gathers a layer's masters before they are rounded.
    Under its `MixedPrecisionPolicy` they arrive in `param_dtype`, so what was trained is what packing makes of masters
    that are saved in it.

    Args:
        model: any torch module, as of `transformers`.
        scheme: how to round.
        ignore: shell-style patterns of module names to leave; by default the logits' matrix.

    Raises InvalidRequestError if nothing is left to round, if groups do not divide a layer, or if a layer is
    parametrized or sharded already.
    """
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or any(fnmatchcase(name, pattern) for pattern in ignore):
            continue
        if parametrize.is_parametrized(module, "weight"):
            raise InvalidRequestError(f"{name} sees its weight through something already.", "Round a model once.")
        if isinstance(module.weight, DTensor):
            raise InvalidRequestError(
                f"{name} is sharded already, and groups would be rounded by pieces.", "Round first, then fully_shard."
            )
        try:
            rule.fake_quantize(module.weight.detach().float(), scheme)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{name}: {error.cause}", f"{error.remedy} Or ignore it.") from error
        names.append(name)
    if not names:
        raise InvalidRequestError("No linear layer is left to round.", "Ignore less.")
    for name in names:
        parametrize.register_parametrization(model.get_submodule(name), "weight", Rounded(scheme))
    return names


def masters(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a model that `fake_quantize` was applied to, with its masters under their plain names.

    ``model.save_pretrained(folder, state_dict=masters(model))`` writes a folder that `headrace quantize --method rtn`
    packs to what training saw, and that ``update_weights`` takes. Sharded masters are gathered: then every rank has to
    call it.
    """
    return {
        name.replace(".parametrizations.weight.original", ".weight"): (
            value.full_tensor() if isinstance(value, DTensor) else value
        )
        for name, value in model.state_dict().items()
    }
