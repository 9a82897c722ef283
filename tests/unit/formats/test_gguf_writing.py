"""Writing GGUF: read back by us and by the gguf package bit for bit; what fails leaves nothing."""

import errno
import os

import gguf
import numpy as np
import pytest

from headrace.base.errors import InvalidRequestError, StorageError
from headrace.formats.gguf import read_gguf, stored_metadata
from headrace.formats.gguf_writer import write_gguf
from headrace.formats.model_folder import new_files
from headrace.numerics.formats import FORMATS
from tests.support.checkpoints import write_tiny_gguf
from tests.support.raw_tensors import quantized, random_tensor

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.eps": 0.1,
    "llama.flag": True,
    "name": "naïve 模型",
    "tokens": ["a", "Ġb", "", "模型", "🙂"],
    "types": [1, 2, -3],
    "scores": [0.5, -1.5],
    "merges": [],
}
TENSORS = {
    **{f"{name}.weight": random_tensor(name, (3, 256), seed) for seed, name in enumerate(FORMATS)},
    "norm.weight": quantized(np.arange(5, dtype=np.float32), "f32"),
}


def test_both_readers_see_what_was_written(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, TENSORS)
    ours, theirs = read_gguf(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert dict(ours.metadata) == METADATA | {"llama.eps": pytest.approx(0.1)}
    assert {key: theirs.fields[key].contents() for key in METADATA} == METADATA | {"llama.eps": pytest.approx(0.1)}
    assert list(ours.tensors) == list(TENSORS) == [tensor.name for tensor in theirs.tensors]
    for stored in theirs.tensors:
        expected = TENSORS[stored.name]
        assert (ours.tensors[stored.name].format, ours.tensors[stored.name].shape) == (expected.format, expected.shape)
        np.testing.assert_array_equal(ours.tensors[stored.name].data, expected.data)
        assert stored.tensor_type.name.lower() == expected.format.name
        np.testing.assert_array_equal(gguf.dequantize(stored.data, stored.tensor_type), expected.to_f32())
        assert stored.data_offset % 32 == 0


def test_types_are_those_that_llama_cpp_asks_for(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, {})
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    kinds = {key: [kind.name for kind in field.types] for key, field in fields.items()}
    assert kinds["llama.block_count"] == ["UINT32"]
    assert kinds["llama.eps"] == ["FLOAT32"]
    assert kinds["types"] == ["ARRAY", "INT32"]
    assert kinds["scores"] == ["ARRAY", "FLOAT32"]
    assert kinds["merges"][0] == "ARRAY"


def test_metadata_of_another_file_keeps_its_types(tmp_path):
    """Among them those that `encoded` does not make, and an alignment that is not carried over."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint64("big", 1 << 40)
    writer.add_array("small", [1, 2, 3])
    writer.add_uint8("tiny", 7)
    writer.add_custom_alignment(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_gguf(tmp_path / "b.gguf", stored_metadata(tmp_path / "a.gguf") | {"tiny": 8}, TENSORS)
    before, after = (gguf.GGUFReader(tmp_path / name).fields for name in ("a.gguf", "b.gguf"))
    assert "general.alignment" not in after
    for key in ("big", "small"):
        assert (after[key].types, after[key].contents()) == (before[key].types, before[key].contents())
    assert (after["tiny"].types[0].name, after["tiny"].contents()) == ("UINT32", 8)
    read_gguf(tmp_path / "b.gguf")


def test_each_tensor_is_read_once(tmp_path):
    reads = []

    def counted(name, tensor):
        return type(tensor)(tensor.format, tensor.shape, lambda: reads.append(name) or tensor.data)

    write_gguf(tmp_path / "a.gguf", METADATA, {name: counted(name, tensor) for name, tensor in TENSORS.items()})
    assert reads == list(TENSORS)


def test_what_the_format_does_not_hold(tmp_path):
    values = np.ones((4, 128), np.float32)
    for name in ("int4_g128_bf16", "int4_g32_f16"):
        with pytest.raises(InvalidRequestError, match=f"x.weight is stored as {name}, which GGUF does not hold"):
            write_gguf(tmp_path / "a.gguf", METADATA, {"x.weight": quantized(values, name)})
    with pytest.raises(InvalidRequestError, match="longer than 63 bytes"):
        write_gguf(tmp_path / "a.gguf", METADATA, {"x" * 64: quantized(values, "f32")})
    assert not list(tmp_path.iterdir())


def write_with_card(folder):
    with new_files(folder / "m.card.md", folder / "m.gguf") as (card, path):
        card.write_text("card")
        write_gguf(path, METADATA, TENSORS)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"m\.gguf cannot be written: No space left on device"):
        write_with_card(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_last_name_cannot_be_given(tmp_path, monkeypatch):
    """What has its name already loses it again."""
    rename = type(tmp_path).rename

    def failing(path, target):
        if target.name == "m.gguf":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        write_with_card(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "m.card.md").write_text("precious")
    with (
        pytest.raises(InvalidRequestError, match=r"m\.card\.md exists already"),
        new_files(tmp_path / "m.card.md", tmp_path / "m.gguf"),
    ):
        pytest.fail("nothing to write to")
    assert (tmp_path / "m.card.md").read_text() == "precious"


def test_interrupted_writers_are_no_hindrance_and_names_come_last(tmp_path):
    (tmp_path / ".m.gguf.partial").write_bytes(b"half")
    with new_files(tmp_path / "m.gguf") as (path,):
        write_gguf(path, METADATA, TENSORS)
        assert not (tmp_path / "m.gguf").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_foreign_file_survives_the_round_trip(tmp_path):
    write_tiny_gguf(tmp_path / "a.gguf", METADATA, TENSORS)
    write_gguf(tmp_path / "b.gguf", stored_metadata(tmp_path / "a.gguf"), read_gguf(tmp_path / "a.gguf").tensors)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
