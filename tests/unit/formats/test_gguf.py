"""Reading GGUF: foreign files are read as written; damaged ones are refused by name."""

import struct
import time

import gguf
import numpy as np
import pytest

from headrace.base.errors import CheckpointError, HeadraceError, UnsupportedModelError
from headrace.formats.gguf import read_gguf
from headrace.formats.gguf_metadata import StringArray
from headrace.numerics.formats import FORMATS
from tests.support.checkpoints import write_tiny_gguf
from tests.support.raw_tensors import quantized, random_tensor

METADATA = {
    "llama.block_count": 2,
    "llama.small": -3,
    "llama.eps": 0.5,
    "llama.flag": True,
    "name": "naïve 模型",
    "tokens": ["a", "Ġb", "", "模型", "🙂"],
    "types": [1, 2, -3],
    "scores": [0.5, -1.5],
    "flags": [True, False],
}


def header(num_tensors, *metadata, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, len(metadata)) + b"".join(metadata)


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def info(name, shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def padded(head, data=b""):
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def refuse(tmp_path):
    """Write these bytes and give the error that opening them raises."""

    def refuse(content):
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(HeadraceError) as caught:
            read_gguf(path)
        assert str(path) in caught.value.cause
        assert caught.value.remedy
        return caught.value

    return refuse


class TestReading:
    def test_metadata_of_every_kind(self, tmp_path):
        metadata = read_gguf(write_tiny_gguf(tmp_path / "m.gguf", METADATA)).metadata
        assert metadata["general.architecture"] == "llama"
        for key, value in METADATA.items():
            assert metadata[key] == value
            assert type(metadata[key]) is (StringArray if key == "tokens" else type(value))

    def test_scalars_of_every_width(self, tmp_path):
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint8("u8", 200)
        writer.add_int8("i8", -100)
        writer.add_uint16("u16", 60_000)
        writer.add_int16("i16", -30_000)
        writer.add_uint64("u64", 1 << 63)
        writer.add_int64("i64", -(1 << 62))
        writer.add_float64("f64", 1e300)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        found = {key: value for key, value in read_gguf(path).metadata.items() if "." not in key}
        assert found == {
            "u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u64": 1 << 63, "i64": -(1 << 62), "f64": 1e300
        }  # fmt: skip

    def test_tensors_of_every_format(self, tmp_path):
        tensors = {f"t.{name}": random_tensor(name, (3, 512)) for name in FORMATS}
        found = read_gguf(write_tiny_gguf(tmp_path / "m.gguf", tensors=tensors)).tensors
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert (found[name].format, found[name].shape) == (tensor.format, tensor.shape)
            np.testing.assert_array_equal(found[name].data, tensor.data)

    def test_shapes_are_outermost_first(self, tmp_path):
        values = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
        tensor = read_gguf(write_tiny_gguf(tmp_path / "m.gguf", tensors={"t": quantized(values, "f16")})).tensors["t"]
        assert tensor.shape == (2, 3, 32)
        np.testing.assert_array_equal(tensor.to_f32(), values)

    def test_tensors_are_read_only_views_that_outlive_the_reader(self, tmp_path):
        path = write_tiny_gguf(tmp_path / "m.gguf", tensors={"t": np.ones((2, 4), np.float32)})
        tensor = read_gguf(path).tensors["t"]
        assert not tensor.data.flags.owndata
        assert not tensor.data.flags.writeable
        path.unlink()
        assert (tensor.to_f32() == 1).all()

    @pytest.mark.parametrize("alignment", [8, 64, 4096])
    def test_alignment(self, tmp_path, alignment):
        tensors = {"a": np.full(3, 1, np.float32), "b": np.full(5, 2, np.float32)}
        found = read_gguf(write_tiny_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, tensors)).tensors
        np.testing.assert_array_equal(found["b"].to_f32(), tensors["b"])

    def test_version_2(self, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(padded(header(1, version=2) + info("t"), np.arange(4, dtype="<f4").tobytes()))
        np.testing.assert_array_equal(read_gguf(path).tensors["t"].to_f32(), [0, 1, 2, 3])

    def test_nested_arrays(self, tmp_path):
        inner = struct.pack("<IQ2I", 4, 2, 7, 8), struct.pack("<IQ", 8, 1) + text("x")
        path = tmp_path / "m.gguf"
        path.write_bytes(header(0, text("k") + struct.pack("<IIQ", 9, 9, 2) + b"".join(inner)))
        assert read_gguf(path).metadata["k"] == [[7, 8], ["x"]]

    def test_a_large_vocabulary_opens_quickly(self, tmp_path):
        tokens = [f"token{i}" for i in range(50_000)]
        path = write_tiny_gguf(tmp_path / "m.gguf", {"tokens": tokens})
        start = time.perf_counter()
        found = read_gguf(path).metadata["tokens"]
        assert time.perf_counter() - start < 0.2, (
            "some 6 ms on an idle core: something takes time per string and per byte"
        )
        assert list(found) == tokens


class TestStringArray:
    @pytest.fixture
    def strings(self, tmp_path):
        return read_gguf(write_tiny_gguf(tmp_path / "m.gguf", METADATA)).metadata["tokens"]

    def test_is_a_sequence(self, strings):
        assert len(strings) == 5
        assert strings[1] == "Ġb"
        assert strings[-1] == "🙂"
        assert strings[1:4] == ["Ġb", "", "模型"]
        assert strings.index("模型") == 3
        assert strings != ["a"]
        with pytest.raises(IndexError):
            strings[5]

    def test_bytes_that_are_not_utf8_name_the_index(self, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(
            header(0, text("toks") + struct.pack("<IIQ", 9, 8, 3) + text("ok") + text(b"\xff") + text("c"))
        )
        strings = read_gguf(path).metadata["toks"]
        assert strings[0] == "ok"
        for read in (lambda: strings[1], lambda: list(strings)):
            with pytest.raises(CheckpointError, match=r"toks\[1\]"):
                read()


class TestDamage:
    def test_missing_and_empty_files(self, tmp_path, refuse):
        assert "empty" in refuse(b"").cause
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_gguf(tmp_path / "none.gguf")

    def test_wrong_magic(self, refuse):
        assert "not a GGUF file" in refuse(b"PK\x03\x04" + bytes(100)).cause

    @pytest.mark.parametrize("version", [0, 1, 4, 1 << 31])
    def test_unknown_version(self, refuse, version):
        assert f"version {version};" in refuse(header(0, version=version)).cause

    def test_big_endian(self, refuse):
        error = refuse(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
        assert isinstance(error, UnsupportedModelError)
        assert "big-endian" in error.cause

    @pytest.mark.parametrize("counts", [(1 << 63, 0), (0, 1 << 63), (1 << 20, 0), (0, 1 << 20)])
    def test_absurd_counts(self, refuse, counts):
        error = refuse(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(100))
        assert ("number of tensors" if counts[0] else "number of metadata entries") in error.cause

    @pytest.mark.parametrize(
        ("entry", "named"),
        [
            (struct.pack("<Q", 1 << 62), "the key of metadata entry 0"),
            (text(b"\xff\xfe"), "the key of metadata entry 0"),
            (text("k") + struct.pack("<I", 99), "k has value type 99"),
            (text("k") + struct.pack("<IB", 7, 2), "k is a bool of value 2"),
            (text("k") + struct.pack("<IQ", 8, 1 << 62), "k is 4611686018427387904"),
            (text("k") + struct.pack("<IIQ", 9, 99, 1), "k has element type 99"),
            (text("k") + struct.pack("<IIQ", 9, 0, 1 << 62), "k is 4611686018427387904"),
            (text("k") + struct.pack("<IIQ", 9, 12, 1000), "k is 1000"),
            (text("k") + struct.pack("<IIQ", 9, 8, 1 << 40), "k is 1099511627776"),
            (text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a") + struct.pack("<Q", 1 << 63), r"k[1] ends after"),
            (text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a") + struct.pack("<Q", (1 << 64) - 1), r"k[1] ends"),
            (text("k") + struct.pack("<IIQ3B", 9, 7, 3, 0, 1, 2), "k has a bool of value 2"),
            (text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6, "k has arrays nested"),
        ],
    )
    def test_bad_metadata(self, refuse, entry, named):
        assert named in refuse(header(0, entry) + bytes(32)).cause

    def test_an_array_is_not_believed_for_the_size_of_the_file(self, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(header(0, text("k") + struct.pack("<IIQ", 9, 0, 1 << 25)))
        with path.open("r+b") as file:
            file.truncate(1 << 26)  # sparse: enough bytes for the claim, none of them written
        with pytest.raises(CheckpointError, match="the length of k is 33554432, an absurd number"):
            read_gguf(path)

    def test_a_key_twice(self, refuse):
        entry = text("k") + struct.pack("<II", 4, 1)
        assert "'k' appears twice" in refuse(header(0, entry, entry)).cause

    @pytest.mark.parametrize("value", [0, 1, 12, 1 << 30])
    def test_bad_alignment(self, refuse, value):
        assert "general.alignment" in refuse(header(0, text("general.alignment") + struct.pack("<II", 4, value))).cause

    @pytest.mark.parametrize(
        ("tensor", "named"),
        [
            (info("w", shape=()), "'w' has 0 dimensions"),
            (info("w", shape=(1,) * 5), "'w' has 5 dimensions"),
            (info("w", shape=(4, 0)), "'w' is empty"),
            (info("w", kind=4), "'w' has type 4"),
            (info("w", kind=1000), "'w' has type 1000"),
            (info("w", shape=(33,), kind=2), "'w' has rows of 33 values"),
            (info("w", offset=8), "'w' is at offset 8"),
            (info("w", offset=1 << 60), "truncated: tensor 'w'"),
            (info("w", shape=(1 << 40, 1 << 60)), "truncated: tensor 'w'"),
            (info("w", shape=(1000,)), "truncated: tensor 'w'"),
        ],
    )
    def test_bad_tensors(self, refuse, tensor, named):
        assert named in refuse(padded(header(1) + tensor, bytes(64))).cause

    def test_a_tensor_in_a_format_that_is_not_read(self, refuse):
        error = refuse(padded(header(1) + info("w", shape=(256,), kind=23), bytes(136)))
        assert isinstance(error, UnsupportedModelError)
        assert "'w' is stored as IQ4_XS" in error.cause

    def test_a_tensor_twice(self, refuse):
        assert "'w' appears twice" in refuse(padded(header(2) + info("w") + info("w", offset=32), bytes(64))).cause

    def test_overlapping_tensors(self, refuse):
        tensors = info("a", shape=(16,)) + info("b", shape=(16,), offset=32)
        assert "'b' overlaps tensor 'a'" in refuse(padded(header(2) + tensors, bytes(128))).cause

    def test_a_part_of_a_split_file(self, tmp_path):
        path = write_tiny_gguf(tmp_path / "m.gguf", {"split.count": 3})
        with pytest.raises(UnsupportedModelError, match="one of 3 parts"):
            read_gguf(path)

    def test_truncation_anywhere(self, tmp_path, refuse):
        """Every proper prefix of a file is refused; its last byte belongs to a tensor."""
        path = write_tiny_gguf(tmp_path / "m.gguf", METADATA, {"a": np.ones(32, np.float32)})
        whole = path.read_bytes()
        for length in range(len(whole)):
            refuse(whole[:length])
