"""Writing compressed-tensors folders: int4 and int8 as pack-quantized, fp8 as float-quantized, mxfp4, nvfp4.

The layouts are those that `compressed_tensors` reads; vLLM, llm-compressor and transformers read them too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.base.errors import InvalidRequestError
from headrace.formats.model_folder import fill, new_folder
from headrace.formats.quantized import KEY
from headrace.formats.safetensors_writer import STORABLE, Plan, SafetensorsFolder, planned_bytes
from headrace.numerics.bitfields import Bytes, Float32
from headrace.numerics.float8 import e4m3_to_f32, f32_to_e4m3, f32_to_e8m0
from headrace.numerics.quantize import nvfp4_divisor
from headrace.numerics.rounding import f32_to_bf16, f32_to_f16
from headrace.numerics.row_blocks import (
    MXFP4,
    NVFP4,
    Groups,
    RowBlocks,
    groups_in,
    pack_nibbles,
    repeat_scales,
    row_blocks,
)
from headrace.numerics.schemes import WHOLE, Float8Scheme, IntegerScheme, Mxfp4Scheme, Nvfp4Scheme
from headrace.numerics.tensor import RawTensor

WritableScheme = IntegerScheme | Float8Scheme | Mxfp4Scheme | Nvfp4Scheme
_SUFFIX = ".weight"
_SCALE_PARTS = {MXFP4: "u8", NVFP4: "f8_e4m3"}  # of other layouts the scale's own type


def write_compressed_tensors(
    target: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    schemes: Mapping[str, WritableScheme],
    files: Sequence[Path] = (),
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Make a folder of a model whose weights are partly quantized. Each tensor is read once, one after the other.

    Args:
        target: the folder; must not exist.
        config: what config.json shall say beside its quantization_config.
        tensors: all of the model's, by their Hugging Face names, in f32, bf16, f16 or row blocks.
        schemes: of every tensor that is in row blocks, by the same names, the scheme that it was rounded to.
        files: copied into the folder (`model_folder.companions`).
        max_shard_bytes: of the tensors in one file; what a weight is made of stays in one. None: all in one file.

    Raises:
        InvalidRequestError: `target` exists, or a tensor cannot be stored in this format; names it.
        StorageError: the folder cannot be written; nothing of it is left.
    """
    plans = [_plan(name, tensor, schemes.get(name)) for name, tensor in tensors.items()]
    stated = {**config, KEY: _quantization_config(tensors, schemes)}
    with new_folder(target) as folder:
        fill(folder, stated, files)
        with SafetensorsFolder(folder, plans, max_shard_bytes) as file:
            for name, tensor in tensors.items():
                for part, data in _stored(name, tensor, schemes.get(name)):
                    file.write(part, data)


def stored_bytes(tensor: RawTensor, scheme: WritableScheme | None) -> int:
    """Bytes that a tensor takes in such a folder, all that it is stored in counted.

    That is less than in row blocks where a zero point has 4 bits in the file, or a scale two levels. Raises as
    `write_compressed_tensors` does.
    """
    return planned_bytes(_plan("tensor.weight", tensor, scheme))


def _plan(name: str, tensor: RawTensor, scheme: WritableScheme | None) -> Plan:
    if scheme is not None:
        return _parts(name, tensor, scheme)
    if tensor.format.name not in ("f32", "bf16", "f16"):
        raise InvalidRequestError(
            f"{name} is stored as {tensor.format.name}, which compressed-tensors does not hold.",
            f"Turn it into one of {', '.join(STORABLE[:3])} first, or give its scheme if it is quantized.",
        )
    return {name: (tensor.format.name, tensor.shape)}


def _parts(name: str, tensor: RawTensor, scheme: WritableScheme) -> Plan:
    """The parts that a quantized weight is stored in. Raises InvalidRequestError if it is not of that scheme."""
    layout = row_blocks(tensor.format.name)
    module = name.removesuffix(_SUFFIX)
    if layout is None or len(tensor.shape) != 2 or module == name:
        raise InvalidRequestError(f"{name} ({tensor.format.name}) is no quantized weight.", "Give it no scheme.")
    rows, features = tensor.shape
    if isinstance(scheme, Float8Scheme):
        block_rows, block_columns = scheme.block_of(rows, features)
        extents = (-(-rows // block_rows), -(-features // block_columns))
        scale_shape: tuple[int, ...] = (1,) if scheme.block == (WHOLE, WHOLE) else extents
        plan: dict[str, tuple[str, tuple[int, ...]]] = {name: ("f8_e4m3", (rows, features))}
    elif not isinstance(scheme, IntegerScheme):
        scale_shape = (rows, features // layout.group_size)
        plan = {f"{module}.weight_packed": ("u8", (rows, features // 2))}
        if isinstance(scheme, Nvfp4Scheme):
            plan[f"{module}.weight_global_scale"] = ("f32", (1,))
    else:
        scale_shape = (rows, features // layout.group_size)
        words = -(-features * scheme.bits // 32)
        plan = {f"{module}.weight_packed": ("i32", (rows, words)), f"{module}.weight_shape": ("i64", (2,))}
        if not scheme.symmetric:
            plan[f"{module}.weight_zero_point"] = ("i32", (-(-rows * scheme.bits // 32), scale_shape[1]))
    if layout != _layout(scheme, rows, features):
        raise InvalidRequestError(f"{name} is stored as {layout.name}, which is not {scheme}.", "Give its own scheme.")
    return plan | {f"{module}.weight_scale": (_SCALE_PARTS.get(layout, layout.scale), scale_shape)}


def _layout(scheme: WritableScheme, rows: int, features: int) -> RowBlocks:
    if isinstance(scheme, Mxfp4Scheme | Nvfp4Scheme):
        return MXFP4 if isinstance(scheme, Mxfp4Scheme) else NVFP4
    if isinstance(scheme, Float8Scheme):
        return RowBlocks("fp8", math.gcd(scheme.block_of(rows, features)[1], features), scheme.scale)
    element = f"{'' if scheme.symmetric else 'u'}int{scheme.bits}"
    return RowBlocks(element, scheme.group_size or features, scheme.scale)


def _stored(name: str, tensor: RawTensor, scheme: WritableScheme | None) -> Iterator[tuple[str, Bytes]]:
    """The bytes of all that a tensor is stored in, by name."""
    if scheme is None:
        yield name, tensor.data
        return
    layout = row_blocks(tensor.format.name)
    assert layout is not None
    groups = groups_in(layout, tensor.data)
    module = name.removesuffix(_SUFFIX)
    scales = groups.scales
    match scheme:
        case Float8Scheme():
            scales = _scales_of_blocks(name, groups, scheme)
            yield name, groups.codes
        case IntegerScheme():
            yield from _packed(module, groups, scheme)
        case _:
            yield from _packed_float4(module, groups, scheme)
            return
    narrow = {"f32": lambda values: values, "bf16": f32_to_bf16, "f16": f32_to_f16}[layout.scale]
    yield f"{module}.weight_scale", np.ascontiguousarray(narrow(scales)).view(np.uint8)


def _scales_of_blocks(name: str, groups: Groups, scheme: Float8Scheme) -> Float32:
    rows, features = groups.codes.shape
    block = scheme.block_of(rows, features)
    scales = groups.scales[:: block[0], :: block[1] // groups.layout.group_size]
    if not np.array_equal(repeat_scales(scales, block, (rows, features))[1], groups.scales, equal_nan=True):
        raise InvalidRequestError(f"{name} has several scales in a block of {scheme}.", "Give its own scheme.")
    return scales


def _packed(module: str, groups: Groups, scheme: IntegerScheme) -> Iterator[tuple[str, Bytes]]:
    signed_bytes = scheme.symmetric and scheme.bits == 8
    codes = groups.codes ^ np.uint8(0x80) if signed_bytes else groups.codes
    yield f"{module}.weight_packed", _words(codes, scheme.bits)
    yield f"{module}.weight_shape", np.array(groups.codes.shape, "<i8").view(np.uint8)
    if groups.zeros is not None:
        by_group = _words(np.ascontiguousarray(groups.zeros.T), scheme.bits).view("<u4")
        yield f"{module}.weight_zero_point", np.ascontiguousarray(by_group.T).view(np.uint8)


def _packed_float4(module: str, groups: Groups, scheme: Mxfp4Scheme | Nvfp4Scheme) -> Iterator[tuple[str, Bytes]]:
    yield f"{module}.weight_packed", pack_nibbles(groups.codes)
    if isinstance(scheme, Mxfp4Scheme):
        yield f"{module}.weight_scale", f32_to_e8m0(groups.scales)
        return
    if scheme.peak is None:
        raise InvalidRequestError(
            f"{module}.weight has a scheme that does not say its peak.", "Give Nvfp4Scheme(peak=…)."
        )
    divisor = nvfp4_divisor(scheme.peak)
    codes = f32_to_e4m3(groups.scales * divisor)
    if not np.array_equal(e4m3_to_f32(codes) / divisor, groups.scales, equal_nan=True):
        raise InvalidRequestError(f"{module}.weight has scales that are not of {scheme}.", "Give its own scheme.")
    yield f"{module}.weight_scale", codes
    yield f"{module}.weight_global_scale", np.array([divisor], "<f4").view(np.uint8)


def _words(codes: Bytes, bits: int) -> Bytes:
    """Codes packed into little-endian 32-bit words, lowest first: ``[n, bytes]``; the last word of a row is padded."""
    padding = -codes.shape[1] % (32 // bits)
    padded = np.pad(codes, ((0, 0), (0, padding)))
    return padded if bits == 8 else pack_nibbles(padded)


def _quantization_config(tensors: Mapping[str, RawTensor], schemes: Mapping[str, WritableScheme]) -> dict[str, Any]:
    """One group per scheme. A single one is for all linear layers but those that are named, as readers expect it."""
    modules: dict[WritableScheme, list[str]] = {}
    for name, scheme in schemes.items():
        if isinstance(scheme, Nvfp4Scheme):
            scheme = Nvfp4Scheme()  # what the config says of it is the same whatever its peak
        modules.setdefault(scheme, []).append(name.removesuffix(_SUFFIX))
    has_embedding = any(_is_embedding(name) for names in modules.values() for name in names)
    by_class = len(modules) == 1 and not has_embedding
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if by_class else names,
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": _format(scheme),
        }
        for i, (scheme, names) in enumerate(modules.items())
    }
    formats = {_format(scheme) for scheme in modules}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _spared(tensors, schemes),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _spared(tensors: Mapping[str, RawTensor], schemes: Mapping[str, WritableScheme]) -> list[str]:
    """Linear layers that are not quantized; also an lm_head that is tied to the embeddings and so has no tensor."""
    plain = {
        name.removesuffix(_SUFFIX)
        for name, tensor in tensors.items()
        if name.endswith(_SUFFIX) and name not in schemes and len(tensor.shape) == 2
    }
    spared = {name for name in plain if not _is_embedding(name)}
    return sorted(spared | ({"lm_head"} - {name.removesuffix(_SUFFIX) for name in schemes}))


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2].startswith("embed")


def _weights(scheme: WritableScheme) -> dict[str, Any]:
    shared = {"dynamic": False, "actorder": None, "block_structure": None, "group_size": None}
    if isinstance(scheme, IntegerScheme):
        strategy = (
            {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
        )
        return {**shared, "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, **strategy}
    if not isinstance(scheme, Float8Scheme):
        one = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": scheme.group_size}
        if isinstance(scheme, Mxfp4Scheme):
            return {**shared, **one, "strategy": "group", "scale_dtype": "torch.uint8"}
        return {**shared, **one, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    strategies: dict[tuple[int, int], dict[str, Any]] = {
        (WHOLE, WHOLE): {"strategy": "tensor"},
        (1, WHOLE): {"strategy": "channel"},
    }
    strategy = strategies.get(scheme.block, {"strategy": "block", "block_structure": list(scheme.block)})
    return {**shared, "num_bits": 8, "type": "float", "symmetric": True, **strategy}


def _format(scheme: WritableScheme) -> str:
    match scheme:
        case IntegerScheme():
            return "pack-quantized"
        case Mxfp4Scheme():
            return "mxfp4-pack-quantized"
        case Nvfp4Scheme():
            return "nvfp4-pack-quantized"
    return "float-quantized"
