"""Reading safetensors: foreign files are read as written; headers that lie are refused by name."""

import json

import numpy as np
import pytest
import safetensors.numpy

from headrace.base.errors import CheckpointError, HeadraceError, UnsupportedModelError
from headrace.formats.safetensors import read_safetensors, read_safetensors_folder
from tests.support.checkpoints import safetensors_bytes, write_hf_folder, write_safetensors
from tests.support.raw_tensors import quantized

INDEX = "model.safetensors.index.json"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def refuse(tmp_path):
    """Write this header and data and give the error that opening them raises."""

    def refuse(header, data=bytes(8), content=None):
        path = tmp_path / "model.safetensors"
        path.write_bytes(safetensors_bytes(header, data) if content is None else content)
        with pytest.raises(HeadraceError) as caught:
            read_safetensors(path)
        assert str(path) in caught.value.cause
        assert caught.value.remedy
        return caught.value

    return refuse


@pytest.fixture
def sharded(tmp_path):
    tensors = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(5)}
    return write_hf_folder(tmp_path / "model", {}, tensors, num_shards=2)


class TestReading:
    def test_a_foreign_file(self, tmp_path):
        rng = np.random.default_rng(0)
        arrays = {"a": rng.normal(size=(3, 5)).astype(np.float32), "b": rng.normal(size=7).astype(np.float16)}
        arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float32)}
        path = tmp_path / "model.safetensors"
        safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
        found = read_safetensors(path)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].shape == array.shape
            np.testing.assert_array_equal(found[name].to_f32(), array.astype(np.float32))
        assert found["b"].format.name == "f16"

    def test_a_foreign_reader_agrees(self, tmp_path):
        values = quantized(np.random.default_rng(1).normal(size=(4, 6)), "f16")
        path = write_safetensors(tmp_path / "m.safetensors", {"t": values})
        np.testing.assert_array_equal(safetensors.numpy.load_file(path)["t"].astype(np.float32), values.to_f32())

    def test_bf16(self, tmp_path):
        torch = pytest.importorskip("torch", reason="numpy has no bf16, so torch writes the foreign file")
        from safetensors.torch import save_file

        values = torch.randn(3, 5, dtype=torch.bfloat16)
        save_file({"t": values}, tmp_path / "m.safetensors")
        tensor = read_safetensors(tmp_path / "m.safetensors")["t"]
        assert tensor.format.name == "bf16"
        np.testing.assert_array_equal(tensor.to_f32(), values.float().numpy())

    def test_parts_of_quantized_weights(self, tmp_path):
        torch = pytest.importorskip("torch", reason="numpy has no 8-bit floats, so torch writes the foreign file")
        from safetensors.torch import save_file

        tensors = {
            "i8": torch.tensor([[-128, 127]], dtype=torch.int8),
            "u8": torch.tensor([[0, 255]], dtype=torch.uint8),
            "i32": torch.tensor([[-(1 << 31), 1 << 30]], dtype=torch.int32),
            "i64": torch.tensor([64, 1 << 40]),
            "f8_e4m3": torch.tensor([[-448.0, 0.5]]).to(torch.float8_e4m3fn),
            "f8_e8m0": torch.tensor([[2.0**-127, 8]]).to(torch.float8_e8m0fnu),
        }
        save_file(tensors, tmp_path / "m.safetensors")
        found = read_safetensors(tmp_path / "m.safetensors")
        for name, tensor in tensors.items():
            assert (found[name].format.name, found[name].shape) == (name, tuple(tensor.shape))
            np.testing.assert_array_equal(found[name].to_f32(), tensor.float().numpy())

    def test_tensors_are_read_only_views(self, tmp_path):
        tensor = read_safetensors(write_safetensors(tmp_path / "m.safetensors", {"t": np.ones(4, np.float32)}))["t"]
        assert not tensor.data.flags.owndata
        assert not tensor.data.flags.writeable

    def test_no_alignment_is_needed(self, tmp_path):
        path = tmp_path / "m.safetensors"
        text = json.dumps({"t": entry()}).encode()
        for padding in range(4):
            path.write_bytes(safetensors_bytes(text + b" " * padding, np.array([1, 2], "<f4").tobytes()))
            np.testing.assert_array_equal(read_safetensors(path)["t"].to_f32(), [1, 2])


class TestLies:
    @pytest.mark.parametrize("content", [b"", b"\x02\0\0", bytes(8)])
    def test_no_header(self, refuse, content):
        refuse(None, content=content)

    @pytest.mark.parametrize("length", [9, 1 << 20, 1 << 62, (1 << 64) - 1])
    def test_a_header_longer_than_the_file(self, refuse, length):
        assert (
            f"header's length is given as {length}" in refuse(None, content=length.to_bytes(8, "little") + b"{}").cause
        )

    @pytest.mark.parametrize(
        "text", [b"{", b"[]", b"nul", b'{"a": \xff}', b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}"]
    )
    def test_a_header_that_is_no_json_object(self, refuse, text):
        assert "JSON" in refuse(text).cause

    def test_a_tensor_twice(self, refuse):
        text = json.dumps(entry())
        assert "'t' twice" in refuse(f'{{"t": {text}, "t": {text}}}'.encode()).cause

    @pytest.mark.parametrize(
        "damage",
        [
            entry(shape=(3,)),  # takes 12 bytes, spans 8
            entry(shape=(1 << 40, 1 << 40)),
            entry(shape=(-2,)),
            entry(shape=(2.0,)),
            entry(shape=(True, 2)),
            entry(shape=(1,) * 9 + (2,)),
            entry(offsets=(8, 0)),
            entry(offsets=(0, 8, 16)),
            entry(offsets=(-8, 0)),
            entry(dtype="F31"),
            entry(dtype=["F32"]),
            {"dtype": "F32", "shape": [2]},
            entry() | {"extra": 1},
            [],
            None,
        ],
    )
    def test_a_bad_entry_is_named(self, refuse, damage):
        assert "'the.tensor'" in refuse({"the.tensor": damage}).cause

    def test_a_type_that_is_not_read(self, refuse):
        error = refuse({"t": entry(dtype="F8_E5M2", shape=(8,))})
        assert isinstance(error, UnsupportedModelError)
        assert "'t' is stored as F8_E5M2" in error.cause

    def test_data_that_is_cut_off(self, refuse):
        assert "truncated: tensor 't'" in refuse({"t": entry()}, bytes(7)).cause

    def test_data_beyond_the_last_tensor(self, refuse):
        assert "1 bytes at its end" in refuse({"t": entry()}, bytes(9)).cause

    def test_a_gap(self, refuse):
        assert "'b' leaves a gap" in refuse({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)).cause

    def test_an_overlap(self, refuse):
        assert "'b' overlaps" in refuse({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)).cause

    def test_truncation_anywhere(self, tmp_path, refuse):
        whole = write_safetensors(tmp_path / "m.safetensors", {"t": np.ones(8, np.float32)}).read_bytes()
        for length in range(len(whole)):
            refuse(None, content=whole[:length])


class TestFolders:
    def test_shards(self, sharded):
        found = read_safetensors_folder(sharded)
        assert sorted(found) == [f"t{i}" for i in range(5)]
        for i in range(5):
            assert (found[f"t{i}"].to_f32() == i).all()

    def test_a_single_file_by_another_name(self, tmp_path):
        write_safetensors(tmp_path / "weights.safetensors", {"t": np.ones(2, np.float32)})
        assert list(read_safetensors_folder(tmp_path)) == ["t"]

    def test_missing_shards_are_all_named(self, sharded):
        for path in sharded.glob("*-of-*"):
            path.unlink()
        with pytest.raises(CheckpointError, match=r"lacks 2 of 2 shards: .*00001-of-00002.*00002-of-00002"):
            read_safetensors_folder(sharded)

    def test_a_tensor_that_is_not_in_its_shard(self, sharded):
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"]["ghost"] = index["weight_map"]["t0"]
        (sharded / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors lacks tensor 'ghost'"):
            read_safetensors_folder(sharded)

    def test_a_tensor_that_the_index_forgot_is_still_there(self, sharded):
        index = json.loads((sharded / INDEX).read_text())
        del index["weight_map"]["t3"]
        (sharded / INDEX).write_text(json.dumps(index))
        assert "t3" in read_safetensors_folder(sharded)

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense", "[1]"])
    def test_a_bad_index(self, sharded, text):
        (sharded / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=INDEX):
            read_safetensors_folder(sharded)

    @pytest.mark.parametrize("file_name", ["../secret.safetensors", "/etc/passwd", "", ".", "..", None, 3])
    def test_an_index_cannot_point_outside_its_folder(self, sharded, file_name):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"t": file_name}}))
        with pytest.raises(CheckpointError, match=r"maps tensor 't'|lacks 1 of 1 shards"):
            read_safetensors_folder(sharded)

    def test_shards_without_an_index(self, sharded):
        (sharded / INDEX).unlink()
        with pytest.raises(CheckpointError, match="2 safetensors files, but no"):
            read_safetensors_folder(sharded)

    def test_pickles_are_refused_with_a_way_out(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model\.bin\)") as caught:
            read_safetensors_folder(tmp_path)
        assert "save_pretrained" in caught.value.remedy

    def test_no_weights_at_all(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds no safetensors"):
            read_safetensors_folder(tmp_path)
