"""Quantized Hugging Face folders: whose format it is, and the tensors as a plain model's folder has them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats import auto_round, awq, compressed_tensors, float8_blocks, gptq, modelopt
from headrace.formats.quantized_module import DO_NOT_MATCH, Parts, modules_in
from headrace.formats.safetensors import read_json_object
from headrace.models.config import Config
from headrace.numerics.tensor import RawTensor

KEY = "quantization_config"

_Reader = Callable[[Config, Mapping[str, Parts]], dict[str, RawTensor]]
_READERS: Mapping[str, tuple[_Reader, tuple[str, ...]]] = {
    "compressed-tensors": (compressed_tensors.read_compressed_tensors, compressed_tensors.PARTS),
    "gptq": (gptq.read_gptq, gptq.PARTS),
    "awq": (awq.read_awq, awq.PARTS),
    "auto-round": (auto_round.read_auto_round, auto_round.PARTS),
    "fp8": (float8_blocks.read_float8_blocks, float8_blocks.PARTS),
    "modelopt": (modelopt.read_modelopt, modelopt.PARTS),
}
_TELLTALES = ("weight_packed", "qweight", "weight_scale", "weight_scale_inv", "weight_scale_2")


def unpack(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, RawTensor]
) -> tuple[Mapping[str, Any], Mapping[str, RawTensor]]:
    """What a quantized folder holds, in the terms of a plain one: a config without its scheme, and a ``weight`` per
    module, in row blocks that are made when they are read. A plain folder is returned as it is.

    Raises:
        CheckpointError: tensors and scheme contradict each other; names module, part and scheme.
        UnsupportedModelError: a method, format or option that is not read; names it.
    """
    scheme = _scheme(folder, config)
    if scheme is None:
        _check_plain(folder, tensors)
        return config, tensors
    method = scheme.text("quant_method")
    if method not in _READERS:
        raise UnsupportedModelError(
            f"quant_method {method!r} in {scheme.where} is not read.",
            f"Read are: {', '.join(_READERS)}, and GGUF files.",
        )
    read, part_names = _READERS[method]
    modules = modules_in(tensors)
    weights = read(scheme, modules)
    if not weights:
        raise CheckpointError(f"{folder} holds no quantized module, but {scheme.where} says {method}.", DO_NOT_MATCH)
    replaced = {f"{module}.{part}" for module in weights for part in part_names}
    kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    plain = {key: value for key, value in config.items() if key != KEY}
    return plain, kept | {f"{module}.weight": weight for module, weight in weights.items()}


def _scheme(folder: Path, config: Mapping[str, Any]) -> Config | None:
    """The scheme of config.json, or ModelOpt's own file, which says more than its copy in config.json."""
    reader = Config(config, "config.json")
    stated = reader.section(KEY) if reader.has(KEY) else None
    own_file = folder / modelopt.CONFIG_FILE
    if own_file.is_file() and (stated is None or stated.text("quant_method") == "modelopt"):
        text = read_json_object(own_file.read_bytes(), str(own_file))
        return Config(text, own_file.name).section("quantization").overridden({"quant_method": "modelopt"})
    return stated


def _check_plain(folder: Path, tensors: Mapping[str, RawTensor]) -> None:
    for name in tensors:
        if name.rpartition(".")[2] in _TELLTALES:
            raise CheckpointError(
                f"{folder} holds {name}, a part of a quantized weight, but nothing that says how to read it.",
                f"Download config.json with its {KEY}, or {modelopt.CONFIG_FILE}.",
            )
