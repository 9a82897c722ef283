"""Reading compressed-tensors: the format of llm-compressor and vLLM.

Source: https://github.com/vllm-project/compressed-tensors (version 0.20: ``quantization/quant_config.py``,
``quant_args.py`` and ``compressors/``). Weights only: what a config says of activations is named in the log.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.module_patterns import check_ignored, matches_name
from headrace.formats.quantization_config import group_size, texts
from headrace.formats.quantized_module import DO_NOT_MATCH, Parts, QuantizedModule, stored_quantized
from headrace.formats.weight_parts import float8, mxfp4, nvfp4, packed_integers, plain_integers
from headrace.models.config import Config
from headrace.numerics.tensor import RawTensor

log = logging.getLogger(__name__)

PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
"""What a quantized module's weight is made of, and what its activations would be quantized with."""

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)  # fmt: skip
_CLASSES = ("Linear", "Embedding")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclass(frozen=True, slots=True)
class _Scheme:
    """One config group: how the weights of its targets are stored."""

    where: str
    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int]

    def __str__(self) -> str:
        sign = "" if self.symmetric else "asymmetric "
        extent = {
            "group": f"groups of {self.group_size}",
            "tensor_group": f"groups of {self.group_size}",
            "block": f"blocks of {self.block[0]} by {self.block[1]}",
        }.get(self.strategy, f"one scale per {self.strategy}")
        return f"{self.where}: {self.format}, {sign}{self.kind}{self.bits}, {extent}"


def read_compressed_tensors(config: Config, modules: Mapping[str, Parts]) -> dict[str, RawTensor]:
    """The weights of all modules that are stored quantized, by module, not yet read.

    Raises:
        CheckpointError: config and tensors contradict each other; names module, part and scheme.
        UnsupportedModelError: the config asks for something that is not read; names it.
    """
    schemes = _schemes(config)
    ignored = texts(config, "ignore")
    config.skip("quant_method", "global_compression_ratio", "version", "producer", "kv_cache_scheme")
    config.warn_unread()
    quantized = stored_quantized(modules, PARTS)
    check_ignored(f"ignore in {config.where}", ignored, matches_name, modules, quantized)
    weights: dict[str, RawTensor] = {}
    used: set[str] = set()
    for name, parts in quantized.items():
        scheme = _scheme_of(name, schemes, config.where)
        used.add(scheme.where)
        weights[name] = _weight(QuantizedModule(name, parts, str(scheme)), scheme)
    for scheme in schemes:
        if scheme.where not in used:
            raise CheckpointError(f"No module that is stored quantized is a target of {scheme}.", DO_NOT_MATCH)
        for target in scheme.targets:
            is_name = target not in _CLASSES and not target.startswith("re:")
            if is_name and target not in quantized and not any(matches_name(pattern, target) for pattern in ignored):
                raise CheckpointError(f"{target}, a target of {scheme}, is not stored quantized.", DO_NOT_MATCH)
    return weights


def _schemes(config: Config) -> list[_Scheme]:
    config.require("quantization_status", "compressed")
    if "sparsity_config" in config.unread():
        config.section("sparsity_config").require("format", "dense")
    for key in ("transform_config", "moe_sparsity_config"):
        if key in config.unread():
            raise UnsupportedModelError(
                f"{key} in {config.where} is not supported.", "Use a checkpoint that is quantized and nothing else."
            )
    if config.has("kv_cache_scheme"):
        log.warning("%s: kv_cache_scheme is without effect: see kv_format.", config.where)
    groups = config.section("config_groups")
    default = config.text("format", "")
    return [_scheme(groups, name, default) for name in groups.unread()]


def _scheme(groups: Config, name: str, default_format: str) -> _Scheme:
    group = groups.section(name)
    if not group.has("weights"):
        raise UnsupportedModelError(
            f"{group.where} quantizes no weights.", "Use a checkpoint that has its weights quantized."
        )
    weights = group.section("weights")
    scheme = _Scheme(
        where=name,
        targets=tuple(texts(group, "targets")),
        format=group.text("format", default_format),
        bits=weights.positive("num_bits", 8),
        kind=weights.text("type", "int"),
        symmetric=weights.boolean("symmetric", True),
        strategy=_strategy(weights),
        group_size=group_size(weights),
        block=_block(weights),
    )
    if scheme.format not in _FORMATS:
        raise UnsupportedModelError(
            f"Format {scheme.format!r} of {group.where} is not read.", f"Read are: {', '.join(_FORMATS)}."
        )
    if scheme.strategy not in _STRATEGIES:
        raise UnsupportedModelError(
            f"Strategy {scheme.strategy!r} of {weights.where} is not read.", f"Read are: {', '.join(_STRATEGIES)}."
        )
    if scheme.strategy in ("group", "tensor_group") and scheme.group_size is None:
        raise weights.wrong("group_size", "a whole number of 1 or more for groups", None)
    if scheme.strategy == "block" and not weights.has("block_structure"):
        raise weights.wrong("block_structure", "rows and columns for blocks", None)
    if weights.has("actorder"):
        weights.require("actorder", "weight", "static", False)
    weights.require("dynamic", False)
    weights.skip("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.refuse_unread()
    if group.has("input_activations"):
        log.info("%s: activations are not quantized, as %s would have it: weights only.", groups.where, name)
    return scheme


def _strategy(weights: Config) -> str:
    if weights.has("strategy"):
        return weights.text("strategy").lower()
    if not weights.has("group_size"):
        return "tensor"
    return "group" if group_size(weights) else "channel"


def _block(weights: Config) -> tuple[int, int]:
    if not weights.has("block_structure"):
        return (0, 0)
    extents = weights.items("block_structure")
    if len(extents) != 2 or not all(type(extent) is int and extent > 0 for extent in extents):
        raise weights.wrong("block_structure", "rows and columns", extents)
    rows, columns = extents
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns


def _scheme_of(name: str, schemes: Sequence[_Scheme], where: str) -> _Scheme:
    """By name, then by expression, then by class: the more exact, the stronger."""
    module_class = "Embedding" if name.rpartition(".")[2].startswith("embed") else "Linear"
    targets = [(target, scheme) for scheme in schemes for target in scheme.targets]
    exact = [scheme for target, scheme in targets if target == name]
    by_expression = [scheme for target, scheme in targets if matches_name(target, name)]
    by_class = [scheme for target, scheme in targets if target == module_class]
    if found := exact + by_expression + by_class:
        return found[0]
    for target, scheme in targets:
        if target not in _CLASSES and "." not in target and target[:1].isupper():
            raise UnsupportedModelError(
                f"Target {target!r} of {scheme.where} in {where} is a class of modules that is not known.",
                f"Known are {' and '.join(_CLASSES)}; name other modules, or give an expression after 're:'.",
            )
    raise CheckpointError(f"{name} is stored quantized, but is no target of any group in {where}.", DO_NOT_MATCH)


def _weight(module: QuantizedModule, scheme: _Scheme) -> RawTensor:
    _check_parts(module, scheme)
    extent = scheme.group_size if scheme.strategy in ("group", "tensor_group") else None
    by_row = scheme.strategy in ("group", "channel")
    match scheme.format, scheme.kind, scheme.bits:
        case "pack-quantized", "int", 4 | 8 if by_row:
            return packed_integers(module, scheme.bits, scheme.symmetric, extent)
        case "int-quantized" | "naive-quantized", "int", 8 if by_row or scheme.strategy == "tensor":
            return plain_integers(module, scheme.symmetric, (None if scheme.strategy == "tensor" else 1, extent))
        case "float-quantized" | "naive-quantized", "float", 8:
            block = {"tensor": (None, None), "channel": (1, None), "block": scheme.block}
            return float8(module, "weight_scale", block.get(scheme.strategy, (1, extent)))
        case "mxfp4-pack-quantized", "float", 4 if extent == 32:
            return mxfp4(module)
        case "nvfp4-pack-quantized", "float", 4 if extent == 16:
            return nvfp4(module, "weight_packed", "weight_global_scale", divides=True)
    raise UnsupportedModelError(
        f"{module.name} is quantized by a scheme that is not read: {scheme}.",
        "Read are int4 and int8 (pack-quantized; int8 also int-quantized), fp8, mxfp4 and nvfp4.",
    )


def _check_parts(module: QuantizedModule, scheme: _Scheme) -> None:
    if "weight_g_idx" in module.parts:
        raise UnsupportedModelError(
            f"{module.name}.weight_g_idx: groups that are no runs of columns (activation order) are not read.",
            'Quantize the model again with actorder="weight", which is as good and keeps its groups together.',
        )
    if not scheme.symmetric and scheme.kind != "int":
        raise UnsupportedModelError(f"{scheme} is not read.", "Floats have no zero points.")
    if scheme.symmetric and "weight_zero_point" in module.parts and module.parts["weight_zero_point"].to_f32().any():
        raise module.error("weight_zero_point", "is not zero")  # zeros are what early versions stored
