"""Packed weights kept on disk: found when they are the same, made again when anything is not."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from headrace import _native
from headrace.executors.native import NativeExecutor
from headrace.executors.weight_cache import WeightCache, source_of
from headrace.graph.passes import fuse
from tests.support.stepping import Stepper
from tests.support.tiny_llama import random_weights, tiny_llama

FORMATS = ("q4_1", "q8_0", "bf16", "f32")
GRAPH = fuse(tiny_llama())
TOKENS = [3, 14, 15, 92, 65]


@pytest.fixture
def cache(tmp_path):
    return WeightCache(tmp_path / "packed", ("a model",), least_bytes=0)


def start(cache, weights=None, **options):
    """A start of the executor, the entry written: whether it took one from the cache, and what it answers."""
    limits = {"num_blocks": 8, "block_size": 4, "max_batched_tokens": 16, "max_num_seqs": 8, "max_model_len": 24}
    weights = weights or random_weights(GRAPH, FORMATS)
    executor = NativeExecutor(GRAPH, weights, weight_cache=cache, **limits, **options)
    for thread in threading.enumerate():
        if thread.name == "headrace-weight-cache":
            thread.join()
    logits = Stepper(executor).logits({"a": TOKENS})["a"]
    from_cache = executor.describe()["weights_from_cache"]
    executor.close()
    return from_cache, logits


def entries(cache):
    return sorted(cache.folder.glob("*.packed"))


@pytest.mark.parametrize("activation", ["f32", "bf16", "int16", "int8"])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_the_second_start_reads_what_the_first_packed(cache, isa, activation):
    missed, packed = start(cache, isa=isa, activation=activation)
    found, read = start(cache, isa=isa, activation=activation)
    assert (missed, found) == (False, True)
    np.testing.assert_array_equal(read, packed)
    assert [path.name for path in cache.folder.iterdir() if path.suffix != ".packed"] == ["lock"]


def test_an_entry_is_of_its_own_weights_though_they_are_exchanged_while_it_is_written(cache, monkeypatch):
    """The bytes to write were the runtime's once, and went with an update: another one's could come to lie there."""
    old, new, newer = (random_weights(GRAPH, FORMATS, seed) for seed in (0, 1, 2))
    go, write = threading.Event(), WeightCache.write
    monkeypatch.setattr(WeightCache, "write", lambda self, *entry: go.wait() and write(self, *entry))
    executor = NativeExecutor(GRAPH, old, weight_cache=cache, num_blocks=8, block_size=4)
    for weights in (new, newer):
        executor.swap_weights(executor.stage_weights(weights))
    go.set()
    executor.close()
    _, packed = start(cache, old)
    (entry,) = entries(cache)
    written = entry.read_bytes()
    entry.unlink()
    start(cache, old)
    assert entry.read_bytes() == written
    np.testing.assert_array_equal(start(cache, old)[1], packed)


def test_other_weights_files_and_kernels_are_not_taken_for_these(cache):
    start(cache)
    changed = random_weights(GRAPH, FORMATS)
    name = next(name for name, tensor in changed.items() if len(tensor.shape) == 2 and name != "embed.weight")
    data = changed[name].stored.copy()
    data[-1, 0] ^= 1
    changed[name] = replace(changed[name], source=data)
    assert not start(cache, weights=changed)[0]
    assert not start(replace(cache, source=("another file",)))[0]
    assert not start(cache, isa="portable", activation="bf16")[0]
    assert start(cache)[0]


def test_another_build_packs_for_itself(cache, monkeypatch):
    start(cache)
    monkeypatch.setattr(_native, "packing_id", "of another build")
    assert not start(cache)[0]


@pytest.mark.parametrize("where", [0, 20, 40, 100, "middle", -1])
def test_one_bit_anywhere_is_found_and_mended(cache, caplog, where):
    _, expected = start(cache)
    (path,) = entries(cache)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if where == "middle" else where] ^= 0x10
    path.write_bytes(data)
    damaged, answer = start(cache)
    assert not damaged
    np.testing.assert_array_equal(answer, expected)
    assert [record.message for record in caplog.records if "damaged" in record.message]
    assert start(cache)[0]


@pytest.mark.parametrize("size", [0, 7, 4096, -1])
def test_half_a_file_is_found_and_mended(cache, caplog, size):
    start(cache)
    (path,) = entries(cache)
    with path.open("rb+") as file:
        file.truncate(size if size >= 0 else path.stat().st_size - 1)
    assert not start(cache)[0]
    assert "damaged" in caplog.text
    assert start(cache)[0]


def test_what_a_killed_writer_left_is_removed(cache):
    cache.folder.mkdir()
    (cache.folder / "0123456789abcdef.partial").write_bytes(b"half")
    start(cache)
    assert sorted(path.suffix for path in cache.folder.iterdir()) == ["", ".packed"]


def test_nothing_is_written_while_another_process_writes(cache):
    cache.folder.mkdir()
    with (cache.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start(cache)
        assert entries(cache) == []
    start(cache)
    assert len(entries(cache)) == 1


STARTS = """
import sys
from pathlib import Path
from tests.unit.executors.test_weight_cache import WeightCache, start
cache = WeightCache(Path(sys.argv[1]), ("a model",), least_bytes=0)
for _ in range(5):
    print(start(cache)[1].tobytes().hex()[:64])
"""


def test_processes_that_start_at_once_share_a_folder(cache):
    command = [sys.executable, "-c", STARTS, str(cache.folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    results = [process.communicate(timeout=120) for process in processes]
    assert {errors for _, errors in results} == {b""}
    assert len({line for output, _ in results for line in output.split()}) == 1
    assert sorted(path.suffix for path in cache.folder.iterdir()) == ["", ".packed"]
    assert start(cache)[0]


def test_a_folder_that_cannot_be_made_is_said_once_and_nothing_worse(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert not start(WeightCache(tmp_path / "file/packed", ("a model",), least_bytes=0))[0]
    assert len([record for record in caplog.records if "weight_cache='off'" in record.message]) == 1


def test_a_read_only_folder_gives_what_it_has(cache, caplog, monkeypatch):
    """Not by its permissions, which root may ignore, but as a file system that is mounted so answers."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    start(cache)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert start(cache)[0]
    assert caplog.text == ""
    assert not start(replace(cache, source=("another file",)))[0]
    assert caplog.text.count("Read-only file system") == 1


FULL = """
import logging, resource, sys
from pathlib import Path
from tests.unit.executors.test_weight_cache import WeightCache, start
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
logging.basicConfig()
print(start(WeightCache(Path(sys.argv[1]), ("a model",), least_bytes=0))[0])
"""


def test_a_full_disk_leaves_nothing_behind(cache):
    command = [sys.executable, "-c", FULL, str(cache.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]


def test_the_least_recently_used_go_first(cache):
    start(cache)
    size = entries(cache)[0].stat().st_size
    small = replace(cache, most_bytes=2 * size + size // 2)
    one, two, three = (replace(small, source=(name,)) for name in ("one", "two", "three"))
    entries(cache)[0].unlink()
    start(one), start(two)
    for path in entries(cache):
        os.utime(path, (time.time() - 1000,) * 2)
    assert start(one)[0], "and so used later than two"
    start(three)
    assert len(entries(cache)) == 2
    assert start(one)[0]
    assert not start(two)[0]


def test_what_is_small_or_too_large_is_not_kept(cache):
    start(replace(cache, least_bytes=1 << 30))
    start(replace(cache, most_bytes=100))
    assert not cache.folder.exists()


def test_files_are_told_apart_by_inode_size_and_time(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same"), two.write_bytes(b"same")
    assert source_of([one]) == source_of([one])
    assert source_of([one]) != source_of([two])
    before = source_of([one])
    os.utime(one, ns=(0, 1))
    assert source_of([one]) != before


def test_checksums_tell_every_bit_and_every_length():
    data = np.random.default_rng(0).integers(0, 256, 200, np.uint8)
    seen = {tuple(_native.checksums(data, 64))}
    for bit in range(8 * len(data)):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(tuple(_native.checksums(changed, 64)))
    assert len(seen) == 1 + 8 * len(data)
    zeros = np.zeros(300, np.uint8)
    assert len({_native.checksums(zeros[:n], 512)[0] for n in range(1, 300)}) == 299
