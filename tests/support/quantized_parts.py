"""Parts of one quantized weight in each foreign arrangement, packed word by word and slowly, with its values."""

from typing import Any

import numpy as np

from headrace.numerics.float4 import E2M1_VALUES
from headrace.numerics.float8 import E4M3_VALUES
from headrace.numerics.rounding import bf16_to_f32, f32_to_bf16
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import part

Array = np.ndarray[Any, Any]
Packed = tuple[dict[str, RawTensor], dict[str, Any], Array]
"""Tensors by part, the quantization config, the values that they stand for (float32)."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ packs its eight outputs in this order, lowest nibble first."""


def pack_words(codes: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Rows of codes into rows of int32, lowest first, the last word padded with zeros."""
    per_word = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // per_word)), np.uint32)
    for row, values in enumerate(codes):
        for i in range(words.shape[1] * per_word):
            word, slot = divmod(i, per_word)
            column = word * per_word + (order or range(per_word))[slot]
            if column < len(values):
                words[row, word] |= np.uint32(int(values[column]) << (bits * slot))
    return words.view(np.int32)


def compressed_tensors_parts(
    rows: int = 8, features: int = 64, bits: int = 4, group_size: int = 32, symmetric: bool = True
) -> Packed:
    """pack-quantized, with bf16 scales."""
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 1 << bits, (rows, features))
    scales = bf16_to_f32(f32_to_bf16(rng.random((rows, features // group_size), np.float32)))
    half = 1 << (bits - 1)
    zeros = np.full(scales.shape, half) if symmetric else rng.integers(0, 1 << bits, scales.shape)
    parts = {
        "weight_packed": part("i32", pack_words(codes, bits)),
        "weight_scale": part("bf16", f32_to_bf16(scales)),
        "weight_shape": part("i64", np.array([rows, features], np.int64)),
    }
    if not symmetric:
        parts["weight_zero_point"] = part("i32", np.ascontiguousarray(pack_words(zeros.T, bits).T))
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return parts, config, _values(codes, zeros, scales)


def gptq_parts(
    rows: int = 8, features: int = 64, bits: int = 4, group_size: int = 32, version: int = 1, g_idx: bool = True
) -> Packed:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (rows, features))
    zeros = rng.integers(1, (1 << bits) - 1, (rows, features // group_size))
    scales = rng.random(zeros.shape).astype(np.float16)
    parts = {
        "qweight": part("i32", np.ascontiguousarray(pack_words(codes, bits).T)),
        "qzeros": part("i32", pack_words(zeros.T - (version == 1), bits)),
        "scales": part("f16", np.ascontiguousarray(scales.T)),
    }
    if g_idx:
        parts["g_idx"] = part("i32", (np.arange(features) // group_size).astype(np.int32))
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return parts, config, _values(codes, zeros, scales.astype(np.float32))


def awq_parts(
    rng: np.random.Generator, rows: int = 16, features: int = 64, group_size: int = 32
) -> tuple[dict[str, RawTensor], dict[str, Any]]:
    codes = rng.integers(0, 16, (rows, features))
    zeros = rng.integers(0, 16, (rows, features // group_size))
    parts = {
        "qweight": part("i32", pack_words(codes.T, 4, AWQ_ORDER)),
        "qzeros": part("i32", pack_words(zeros.T, 4, AWQ_ORDER)),
        "scales": part("f16", rng.random(zeros.T.shape).astype(np.float16)),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return parts, config


def modelopt_parts(algorithm: str, rows: int = 8, features: int = 64) -> Packed:
    """The config is the ``quantization`` of hf_quant_config.json."""
    rng = np.random.default_rng(len(algorithm))
    config: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": []}
    if algorithm == "FP8":
        codes = rng.integers(0, 127, (rows, features), np.uint8)
        parts = {"weight": part("f8_e4m3", codes), "weight_scale": part("f32", np.array(0.37, np.float32))}
        return parts, config, E4M3_VALUES[codes] * np.float32(0.37)
    if algorithm == "W4A16_AWQ":
        signed = rng.integers(-8, 8, (rows, features))
        scales = rng.random((rows, features // 32), np.float32)
        nibbles = (signed & 15).astype(np.uint8)
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
        parts = {"weight": part("u8", packed), "weight_scale": part("f32", scales)}
        return parts, {**config, "group_size": 32}, _values(signed, np.zeros(scales.shape), scales)
    codes = rng.integers(0, 16, (rows, features), np.uint8)
    scale_codes = rng.integers(0, 127, (rows, features // 16), np.uint8)
    tensor_scale = np.float32(0.0123)
    parts = {
        "weight": part("u8", codes[:, 0::2] | (codes[:, 1::2] << 4)),
        "weight_scale": part("f8_e4m3", scale_codes),
        "weight_scale_2": part("f32", np.array(tensor_scale)),
        "input_scale": part("f32", np.array(1, np.float32)),
    }
    scales = np.repeat(E4M3_VALUES[scale_codes] * tensor_scale, 16, axis=1)
    return parts, {**config, "group_size": 16}, E2M1_VALUES[codes] * scales


def _values(codes: Array, zeros: Array, scales: Array) -> Array:
    size = codes.shape[1] // scales.shape[1]
    return (codes - np.repeat(zeros, size, axis=1)).astype(np.float32) * np.repeat(scales, size, axis=1)
