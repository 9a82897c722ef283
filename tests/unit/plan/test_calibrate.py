import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from headrace import _native
from headrace.plan import calibrate as module
from headrace.plan.calibrate import calibrate, pace, working_sets
from headrace.plan.host import Host
from headrace.plan.load import Disturbance, Watch
from tests.unit.plan.machines import machine

MIB = 1 << 20
ISA = _native.available_isas()[-1]
THREADS = _native.available_cores()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of its own, and a machine that nobody else uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Watch, "disturbance", lambda self: Disturbance())
    return tmp_path / "headrace"


@pytest.fixture
def quick(monkeypatch):
    """Rates from a counter instead of the machine."""
    runs = []

    def measure(host, num_threads, isa):
        runs.append((num_threads, isa))
        return {
            "read_bandwidth": {"1048576": 1e9 * len(runs)},
            "matrix_rate": {"f32": 1e12},
            "measured_at": "2026-11-25",
        }

    monkeypatch.setattr(module, "_measure", measure)
    return runs


def speed(host: Host | None = None, **options) -> float:
    arguments = {"num_threads": 2, "isa": "portable"} | options
    return calibrate(host or Host.here(), **arguments).machine.bandwidth(MIB) / 1e9


def test_this_machine_is_measured_within_seconds(cache):
    start = time.perf_counter()
    made = calibrate(Host.here(), num_threads=THREADS, isa=ISA)
    assert time.perf_counter() - start < 20, "about two seconds on a machine of its own"
    assert made.measured_now
    assert [made.cache_file] == list(cache.iterdir())
    machine = made.machine
    assert list(machine.read_bandwidth) == working_sets(Host.here())
    assert list(machine.matrix_rate) == _native.arithmetics(ISA)
    assert all(1e8 < rate < 1e13 for rate in machine.read_bandwidth.values())
    assert all(1e8 < rate < 1e16 for rate in machine.matrix_rate.values())
    kept = calibrate(Host.here(), num_threads=THREADS, isa=ISA)
    assert not kept.measured_now
    assert kept.machine.read_bandwidth == machine.read_bandwidth
    assert kept.machine.matrix_rate == machine.matrix_rate


def test_it_is_measured_once_and_again_when_asked(quick):
    assert [speed(), speed(), speed(remeasure=True), speed()] == [1, 1, 2, 2]


def test_rates_of_another_machine_threads_or_instruction_set_are_not_used(quick):
    host = Host.here()
    others = [
        replace(host, cpu="another"),
        replace(host, cpus=(*host.cpus, 99)),
        replace(host, memory_total=host.memory_total + 1),
        replace(host, caches={"L2": 1}),
    ]
    speeds = [speed(host), *(speed(other) for other in others), speed(num_threads=3), speed(isa="other")]
    assert speeds == list(range(1, 8))
    assert speed(host) == 1


def test_a_file_that_was_renamed_to_this_machines_is_not_used(quick, cache):
    speed()
    (file,) = cache.iterdir()
    speed(num_threads=3)
    (other,) = set(cache.iterdir()) - {file}
    other.replace(file)
    assert speed() == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"key": 1}', "\x00\xff", None],
    ids=["empty", "half", "list", "null", "wrong", "binary", "bad rates"],
)
def test_a_corrupt_file_is_measured_again(quick, cache, text):
    speed()
    (file,) = cache.iterdir()
    if text is None:
        values = json.loads(file.read_text())
        text = json.dumps(values | {"read_bandwidth": {"1048576": -3}})
    file.write_text(text)
    assert speed() == 2
    assert speed() == 2, "and replaced"


def test_a_cache_that_cannot_be_written_is_said_and_nothing_worse(quick, cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the directory would be")
    made = calibrate(Host.here(), num_threads=2, isa="portable")
    assert made.measured_now
    assert str(cache) in made.cache_problem


def test_a_full_disk_leaves_neither_half_a_file_nor_an_error(quick, cache, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.json, "dump", full)
    made = calibrate(Host.here(), num_threads=2, isa="portable")
    assert "No space left on device" in made.cache_problem
    assert list(cache.iterdir()) == []


def test_no_home_directory_is_no_error(quick, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    made = calibrate(Host.here(), num_threads=2, isa="portable")
    assert (made.cache_file, made.cache_problem) == (None, "there is no home directory")


def test_a_relative_cache_directory_is_ignored(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibrate(Host.here(), num_threads=2, isa="portable").cache_file.parent == tmp_path / ".cache/headrace"


@pytest.mark.parametrize("seen", [Disturbance(others=1.0), Disturbance(steal=0.3)])
def test_rates_that_others_spoiled_are_used_and_not_kept(quick, cache, monkeypatch, seen):
    monkeypatch.setattr(Watch, "disturbance", lambda self: seen)
    made = calibrate(Host.here(), num_threads=2, isa="portable")
    assert made.disturbance == seen
    assert not cache.exists()
    assert speed() == 2


def test_rates_under_a_quota_are_kept(quick, monkeypatch):
    monkeypatch.setattr(Watch, "disturbance", lambda self: Disturbance(throttled=9))
    assert [speed(), speed()] == [1, 1]


def test_working_sets_go_from_a_cache_to_beyond_all_within_the_memory():
    host = replace(Host.here(), memory_available=64 << 30, caches={"L3": 32 * MIB})
    sizes = working_sets(host)
    assert (sizes[0], sizes[-1]) == (MIB // 8, 512 * MIB)
    assert sizes == sorted(set(sizes))
    assert working_sets(replace(host, caches={"L3": 512 * MIB}))[-1] == 2048 * MIB
    assert working_sets(replace(host, memory_available=80 * MIB))[-1] == 10 * MIB
    assert working_sets(replace(host, memory_available=0))[-1] == 64 * MIB
    assert working_sets(replace(host, memory_available=1))[0] == MIB // 8


def test_more_threads_than_cores_measure_the_cores(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "working_sets", lambda host: [MIB])
    monkeypatch.setattr(_native, "read_bandwidth", lambda size, threads, seconds: asked.append(threads) or 1e9)
    monkeypatch.setattr(_native, "matrix_rate", lambda name, isa, threads, seconds: asked.append(threads) or 1e9)
    assert calibrate(Host.here(), num_threads=999, isa="portable").machine.num_threads == 999
    assert set(asked) == {THREADS}


def test_the_key_holds_the_build():
    key = module._key(Host.here(), 2, "portable")
    assert key["build"] == [os.stat(_native.__file__).st_size, os.stat(_native.__file__).st_mtime_ns]


def test_pace_is_a_share_of_the_fastest_rate(monkeypatch):
    asked = []
    monkeypatch.setattr(_native, "matrix_rate", lambda *what: asked.append(what[:3]) or 4e12)
    monkeypatch.setattr(_native, "available_cores", lambda: 2)  # of a quota of two, say
    assert pace(machine(num_threads=8, cores=8)) == 0.25
    assert asked == [("int8", "amx", 2)]


def test_pace_of_this_machine():
    assert pace(calibrate(Host.here(), num_threads=THREADS, isa=ISA).machine) > 0.1
