"""Whatever bytes a model file has, opening it ends: with tensors inside the file, or with an error for users."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.gguf import read_gguf
from headrace.formats.safetensors import read_safetensors
from tests.support.checkpoints import write_safetensors, write_tiny_gguf
from tests.support.raw_tensors import quantized

DAMAGE = st.tuples(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.integers(0, 255), st.just(255))), max_size=6
    ),  # where, and what is written there
    st.one_of(st.none(), st.floats(0, 1)),  # what share of the file is left
)
FUZZ = settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(whole, damage, header_bytes):
    """Most of a file is data, where no damage shows: the header is aimed at."""
    flips, kept = damage
    content = bytearray(whole)
    for where, value in flips:
        content[int(where * header_bytes)] = value
    return bytes(content if kept is None else content[: int(kept * len(content))])


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    metadata = {"n": 1, "x": 0.5, "b": True, "tokens": ["a", "bc", "模"], "types": [1, 2], "flags": [True]}
    tensors = {"a": np.ones((2, 3), np.float32), "b": quantized(np.ones((2, 32)), "q4_1")}
    return write_tiny_gguf(path, metadata, tensors).read_bytes()


@pytest.fixture(scope="module")
def safetensors_bytes(tmp_path_factory):
    tensors = {"a": np.ones((2, 3), np.float32), "b": quantized(np.ones((4, 2)), "bf16")}
    return write_safetensors(tmp_path_factory.mktemp("safetensors") / "m.safetensors", tensors).read_bytes()


@FUZZ
@given(damage=DAMAGE)
def test_gguf(gguf_bytes, tmp_path, damage):
    path = tmp_path / "m.gguf"
    path.write_bytes(damaged(gguf_bytes, damage, len(gguf_bytes) - 100))
    with suppress(CheckpointError, UnsupportedModelError):
        file = read_gguf(path)
        for value in file.metadata.values():
            if not isinstance(value, int | float | str):
                list(value)
        touch(file.tensors)


@FUZZ
@given(damage=DAMAGE)
def test_safetensors(safetensors_bytes, tmp_path, damage):
    path = tmp_path / "m.safetensors"
    path.write_bytes(damaged(safetensors_bytes, damage, len(safetensors_bytes) - 40))
    with suppress(CheckpointError, UnsupportedModelError):
        touch(read_safetensors(path))


def touch(tensors):
    """Read every byte: a view outside the mapping would end the process."""
    for tensor in tensors.values():
        assert tensor.to_f32().shape == tensor.shape
