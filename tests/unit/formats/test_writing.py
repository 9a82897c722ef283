"""Writing model folders: what is written is read back bit for bit; what fails leaves nothing."""

import errno
import json
import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from headrace.base.errors import InvalidRequestError, StorageError
from headrace.formats.checkpoint import open_checkpoint
from headrace.formats.compressed_tensors_writer import write_compressed_tensors
from headrace.formats.model_folder import companions, new_folder
from headrace.formats.safetensors import read_safetensors
from headrace.formats.safetensors_writer import SafetensorsFile
from headrace.numerics.quantize import quantize
from headrace.numerics.schemes import WHOLE, Float8Scheme, IntegerScheme, Mxfp4Scheme, Nvfp4Scheme
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import quantized, random_tensor

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
SCHEMES = [
    *(
        IntegerScheme(bits=bits, group_size=group_size, symmetric=symmetric, scale=scale)
        for bits in (4, 8)
        for group_size in (32, WHOLE)
        for symmetric in (True, False)
        for scale in ("f32", "bf16", "f16")
    ),
    Float8Scheme(block=(WHOLE, WHOLE)),
    Float8Scheme(block=(1, WHOLE), scale="bf16"),
    Float8Scheme(block=(128, 128)),
    Float8Scheme(block=(5, 32)),
    Mxfp4Scheme(),
    Nvfp4Scheme(peak=5.0),
]
BLOCKS = Float8Scheme(block=(5, 32))


def values(rows, features, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, features)).astype(np.float32)


def model(*schemes):
    """Some quantized matrices, a plain one, a vector; rows that fill no whole number of words."""
    names = (UP, DOWN)[: len(schemes)]
    tensors = {name: RawTensor.from_groups(quantize(values(139, 192, i), s)) for i, (name, s) in
               enumerate(zip(names, schemes, strict=True))}  # fmt: skip
    tensors[HEAD] = quantized(values(7, 192), "bf16")
    tensors["model.norm.weight"] = quantized(values(1, 192)[0], "f16")
    return tensors, dict(zip(names, schemes, strict=True))


class TestRoundTrip:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_every_scheme(self, tmp_path, scheme):
        tensors, schemes = model(scheme)
        write_compressed_tensors(tmp_path / "out", {"model_type": "llama"}, tensors, schemes)
        checkpoint = open_checkpoint(tmp_path / "out")
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = checkpoint.tensors[name]
            assert (found.format, found.shape) == (tensor.format, tensor.shape)
            np.testing.assert_array_equal(found.data, tensor.data)

    def test_two_schemes(self, tmp_path):
        tensors, schemes = model(SCHEMES[0], BLOCKS)
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert stated["format"] == "mixed-precision"
        assert [group["targets"] for group in stated["config_groups"].values()] == [
            ["model.layers.0.mlp.up_proj"],
            ["model.layers.0.mlp.down_proj"],
        ]
        found = open_checkpoint(tmp_path / "out").tensors
        for name in (UP, DOWN):
            np.testing.assert_array_equal(found[name].data, tensors[name].data)

    def test_layers_that_are_not_quantized_are_named(self, tmp_path):
        tensors, schemes = model(SCHEMES[0])
        tensors["model.layers.0.mlp.gate.weight"] = quantized(values(3, 192), "bf16")
        tensors["model.embed_tokens.weight"] = tensors[HEAD]
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert stated["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
        assert stated["config_groups"]["group_0"]["targets"] == ["Linear"]

    def test_a_tied_head_is_named_too(self, tmp_path):
        tensors, schemes = model(SCHEMES[0])
        del tensors[HEAD]
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert stated["ignore"] == ["lm_head"], "it is a linear layer, though it has no tensor of its own"
        open_checkpoint(tmp_path / "out")

    @pytest.mark.parametrize("scheme", [IntegerScheme(group_size=32), Float8Scheme(block=(1, 32)), Mxfp4Scheme(),
                                        Nvfp4Scheme(peak=4.0)], ids=str)  # fmt: skip
    def test_damage_survives(self, tmp_path, scheme):
        damaged = values(4, 64)
        damaged[1, 3] = np.nan
        tensors = {UP: RawTensor.from_groups(quantize(damaged, scheme))}
        write_compressed_tensors(tmp_path / "out", {}, tensors, {UP: scheme})
        found = open_checkpoint(tmp_path / "out").tensors[UP].to_f32()
        np.testing.assert_array_equal(found, tensors[UP].to_f32())
        assert np.isnan(found).sum() == tensors[UP].format.block_size

    def test_each_tensor_is_read_once(self, tmp_path):
        tensors, schemes = model(SCHEMES[0])
        reads = []

        def counted(name, tensor):
            return RawTensor(tensor.format, tensor.shape, lambda: reads.append(name) or tensor.data)

        write_compressed_tensors(tmp_path / "out", {}, {n: counted(n, t) for n, t in tensors.items()}, schemes)
        assert sorted(reads) == sorted(tensors)


class TestShards:
    @pytest.mark.parametrize("max_bytes", [1, 4000, 31_000, 10**9])
    def test_are_read_as_one_file_is(self, tmp_path, max_bytes):
        tensors, schemes = model(SCHEMES[0], BLOCKS)
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes, max_shard_bytes=max_bytes)
        names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        num_shards = {1: 4, 4000: 3, 31_000: 2}.get(max_bytes, 1)
        assert len(names) == num_shards
        if num_shards == 1:
            assert names == ["model.safetensors"]
            assert not (tmp_path / "out/model.safetensors.index.json").exists()
            return
        assert names == [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        held = {file: read_safetensors(tmp_path / "out" / file) for file in names}
        assert index["weight_map"] == {name: file for file, parts in held.items() for name in parts}
        sizes = {file: sum(part.num_bytes for part in parts.values()) for file, parts in held.items()}
        assert index["metadata"]["total_size"] == sum(sizes.values())
        assert all(size <= max_bytes for size in sizes.values()) == (max_bytes == 31_000), "a weight is not torn apart"
        up = {file for name, file in index["weight_map"].items() if "up_proj" in name}
        assert len(up) == 1, "the parts of a weight are in one shard"
        for name, found in open_checkpoint(tmp_path / "out").tensors.items():
            np.testing.assert_array_equal(found.data, tensors[name].data)

    def test_room_for_all_is_claimed_at_once(self, tmp_path, monkeypatch):
        claimed, written = [], []
        claim, write = os.posix_fallocate, os.pwrite
        monkeypatch.setattr(os, "posix_fallocate", lambda *of: claimed.append(len(written)) or claim(*of))
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: written.append(at) or write(fd, data, at))
        tensors, schemes = model(SCHEMES[0])
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes, max_shard_bytes=1)
        assert claimed == [0, 1, 2], "nothing but headers is written before"

    @pytest.mark.parametrize("nth", [1, 2, 3])
    def test_a_disk_that_fills_up_leaves_nothing(self, tmp_path, monkeypatch, nth):
        calls = []

        def full(fd, offset, size):
            calls.append(size)
            if len(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        tensors, schemes = model(SCHEMES[0])
        opened = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StorageError, match="No space left"):
            write_compressed_tensors(tmp_path / "out", {}, tensors, schemes, max_shard_bytes=1)
        assert not list(tmp_path.iterdir())
        assert len(os.listdir("/proc/self/fd")) == opened, "no file stays open"


class TestRefusals:
    @pytest.mark.parametrize(
        ("scheme", "stated"),
        [
            (IntegerScheme(group_size=32), IntegerScheme(group_size=64)),
            (IntegerScheme(group_size=32), IntegerScheme(group_size=32, scale="f16")),
            (IntegerScheme(group_size=32), IntegerScheme(group_size=32, symmetric=False)),
            (IntegerScheme(group_size=32), Float8Scheme()),
            (Mxfp4Scheme(), IntegerScheme(group_size=32)),
            (Float8Scheme(block=(1, WHOLE)), Float8Scheme(block=(2, WHOLE))),
            (Nvfp4Scheme(), Mxfp4Scheme()),
            (Nvfp4Scheme(peak=5.0), Nvfp4Scheme(peak=7.0)),
            (Nvfp4Scheme(), Nvfp4Scheme()),
        ],
    )
    def test_a_tensor_of_another_scheme(self, tmp_path, scheme, stated):
        tensors, _ = model(scheme)
        with pytest.raises(InvalidRequestError, match=UP):
            write_compressed_tensors(tmp_path / "out", {}, tensors, {UP: stated})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("format_name", ["q4_0", "int4_g32_bf16"])
    def test_what_the_format_does_not_hold(self, tmp_path, format_name):
        tensors, schemes = model(SCHEMES[0])
        stray = random_tensor("q4_0", (4, 64)) if format_name == "q4_0" else tensors[UP]
        with pytest.raises(InvalidRequestError, match=f"model.extra.weight is stored as {stray.format.name}"):
            write_compressed_tensors(tmp_path / "out", {}, tensors | {"model.extra.weight": stray}, schemes)

    def test_a_plain_tensor_with_a_scheme(self, tmp_path):
        tensors, schemes = model(SCHEMES[0])
        with pytest.raises(InvalidRequestError, match=r"lm_head.weight \(bf16\) is no quantized weight"):
            write_compressed_tensors(tmp_path / "out", {}, tensors, schemes | {HEAD: SCHEMES[0]})

    def test_nothing_is_overwritten(self, tmp_path):
        tensors, schemes = model(SCHEMES[0])
        with pytest.raises(InvalidRequestError, match="exists already"):
            write_compressed_tensors(tmp_path, {}, tensors, schemes)


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch, call):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        tensors, schemes = model(SCHEMES[0])
        monkeypatch.setattr(os, call, full)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        assert caught.value.remedy
        assert not list(tmp_path.iterdir())

    def test_a_tensor_that_fails_leaves_nothing(self, tmp_path):
        tensors, schemes = model(SCHEMES[0])
        tensors[HEAD] = RawTensor(tensors[HEAD].format, (7, 192), lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        assert not list(tmp_path.iterdir())

    def test_what_an_interrupted_writer_left_is_no_hindrance(self, tmp_path):
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.partial/model.safetensors").write_bytes(b"half")
        tensors, schemes = model(SCHEMES[0])
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        open_checkpoint(tmp_path / "out")

    def test_the_name_appears_last(self, tmp_path):
        with new_folder(tmp_path / "a/out") as folder:
            assert not (tmp_path / "a/out").exists()
            (folder / "x").write_text("x")
        assert (tmp_path / "a/out/x").read_text() == "x"

    def test_bytes_are_on_the_disk_before_the_name_is(self, tmp_path, monkeypatch):
        order, sync, rename = [], os.fsync, type(tmp_path).rename
        monkeypatch.setattr(os, "fsync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
        monkeypatch.setattr(type(tmp_path), "rename", lambda *paths: order.append("renamed") or rename(*paths))
        tensors, schemes = model(SCHEMES[0])
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        at = order.index("renamed")
        partial = tmp_path / ".out.partial"
        assert {str(partial), f"{partial}/config.json", f"{partial}/model.safetensors"} <= set(order[:at])
        assert order[at + 1 :] == [str(tmp_path)]

    def test_a_place_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="out cannot be written"), new_folder(tmp_path / "file/out"):
            pass

    def test_modes_are_the_users(self, tmp_path):
        before = os.umask(0o027)
        try:
            tensors, schemes = model(SCHEMES[0])
            write_compressed_tensors(tmp_path / "out", {}, tensors, schemes)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
        assert stat.S_IMODE((tmp_path / "out/model.safetensors").stat().st_mode) == 0o640


class TestCompanions:
    def test_are_copied(self, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        kept = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x", "merges.txt": ""}
        for name, text in kept.items():
            (source / name).write_text(text)
        for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", ".cache",
                     "pytorch_model.bin", "hf_quant_config.json"):  # fmt: skip
            (source / name).write_text("not this")
        (source / "subfolder").mkdir()
        tensors, schemes = model(SCHEMES[0])
        write_compressed_tensors(tmp_path / "out", {}, tensors, schemes, companions(source))
        written = {path.name for path in (tmp_path / "out").iterdir()}
        assert written == kept.keys() | {"config.json", "model.safetensors"}
        assert (tmp_path / "out/chat_template.jinja").read_text() == "x"


class TestSafetensorsFile:
    def test_a_foreign_reader(self, tmp_path):
        plan = {"b": ("i32", (2, 3)), "a": ("f32", (3,)), "c": ("u8", (5,)), "d": ("i64", (1,)), "e": ("f32", ())}
        arrays = {
            "b": np.arange(6, dtype="<i4").reshape(2, 3),
            "a": np.array([1, 2, 3], "<f4"),
            "c": np.arange(5, dtype=np.uint8),
            "d": np.array([1 << 40], "<i8"),
            "e": np.array(7, "<f4"),
        }
        with SafetensorsFile(tmp_path / "m.safetensors", plan, {"format": "pt"}) as file:
            for name, array in arrays.items():
                file.write(name, np.atleast_1d(array).view(np.uint8))
        found = safetensors.numpy.load_file(tmp_path / "m.safetensors")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
        with safetensors.safe_open(tmp_path / "m.safetensors", "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert read_safetensors(tmp_path / "m.safetensors")["b"].shape == (2, 3)

    def test_short_writes_are_continued(self, tmp_path, monkeypatch):
        whole = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:3], at))
        with SafetensorsFile(tmp_path / "m.safetensors", {"t": ("u8", (100,))}, {}) as file:
            file.write("t", np.arange(100, dtype=np.uint8))
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "m.safetensors")["t"], np.arange(100))

    def test_a_tensor_that_is_forgotten_or_of_another_size(self, tmp_path):
        with (
            pytest.raises(AssertionError, match="not written: \\['t'\\]"),
            SafetensorsFile(tmp_path / "a", {"t": ("u8", (4,))}, {}),
        ):
            pass
        with (
            pytest.raises(AssertionError, match="t takes 4 bytes, not 5"),
            SafetensorsFile(tmp_path / "b", {"t": ("u8", (4,))}, {}) as file,
        ):
            file.write("t", np.zeros(5, np.uint8))
