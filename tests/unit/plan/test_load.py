import multiprocessing
import os
import time

import pytest

from headrace.plan.host import Host
from headrace.plan.load import Disturbance, watch
from tests.unit.plan.hosts import STAT, V1_HALF_A_CORE, V2_HALF_A_CORE, write_root

HERTZ = os.sysconf("SC_CLK_TCK")


def stat(cpu0: str) -> str:
    return STAT.replace("cpu0 0 0 0 0 0 0 0 0", f"cpu0 {cpu0}")


@pytest.mark.parametrize("files", [V2_HALF_A_CORE, V1_HALF_A_CORE])
def test_throttling_is_counted_in_both_versions_of_groups(tmp_path, files):
    host = Host.here(write_root(tmp_path, files), cpus=(0,))
    with watch(host) as seen:
        for name in files:
            if name.endswith("cpu.stat"):
                write_root(tmp_path, {name: "nr_periods 12\nnr_throttled 5\n"})
    assert seen.disturbance().throttled == 2
    assert not seen.disturbance().spoils_rates


def test_time_of_other_processes_and_of_other_machines(tmp_path):
    host = Host.here(write_root(tmp_path, {"/proc/stat": STAT}), cpus=(0, 1))
    with watch(host) as seen:
        time.sleep(0.2)
        ticks = int(0.1 * HERTZ)
        write_root(tmp_path, {"/proc/stat": stat(f"{ticks} {ticks} 0 0 0 0 0 {ticks}")})
    found = seen.disturbance()
    assert found.others == pytest.approx(1.0, abs=0.25), "0.2 s of work in 0.2 s"
    assert found.steal == pytest.approx(0.25, abs=0.1), "0.1 s of the 0.4 s on two processors"
    assert found.others_matter
    assert found.steal_matters
    assert found.spoils_rates


def test_processors_that_are_not_ours_do_not_count(tmp_path):
    host = Host.here(write_root(tmp_path, {"/proc/stat": STAT}), cpus=(1,))
    with watch(host) as seen:
        time.sleep(0.02)
        write_root(tmp_path, {"/proc/stat": stat("1000 1000 1000 0 0 0 0 1000")})
    assert seen.disturbance() == Disturbance()


def test_a_machine_that_tells_nothing_is_undisturbed(tmp_path):
    with watch(Host.here(str(tmp_path), cpus=(0,))) as seen:
        time.sleep(0.01)
    assert seen.disturbance() == Disturbance()


def test_another_process_at_work_is_seen_and_our_own_work_is_not():
    """Strangers may be at work in either window: once in five times they are not, or not more in the second."""
    host = Host.here()
    found = []
    for _ in range(5):
        other = multiprocessing.get_context("fork").Process(target=_work, args=(1.0,))
        other.start()
        with watch(host) as seen:
            time.sleep(0.6)
        other.join()
        with watch(host) as alone:
            _work(0.6)
        assert seen.disturbance().others > 0.3
        found.append((seen.disturbance().others, alone.disturbance().others))
        if found[-1][1] < found[-1][0] - 0.4:
            return
    pytest.fail(f"our own time counts as others': {found}")


def _work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
