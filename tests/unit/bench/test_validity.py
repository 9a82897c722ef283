from types import SimpleNamespace

import pytest

from headrace.bench.validity import (
    Check,
    check_client,
    check_disturbance,
    check_limits,
    check_outputs,
    check_pace,
    check_spread,
    check_warm_up,
    worst,
)
from headrace.bench.workloads import Batch
from headrace.plan.load import Disturbance

BATCH = Batch(((1, 2), (3,)), (3, 2))
RIGHT = [[5, 6, 7], [8, 9]]


def test_outputs_of_the_right_lengths_that_repeat_are_well():
    check = check_outputs(BATCH, [RIGHT, RIGHT, [[5], [8]]])
    assert check.verdict == "ok", "shorter runs must be beginnings"


@pytest.mark.parametrize(
    ("repeats", "says"),
    [
        ([[[5, 6], [8, 9]]], "1 of 2 outputs"),
        ([RIGHT, [[5, 6, 7], [8, 0]]], "run 2 of request 1 differs from run 1 at token 1"),
        ([RIGHT, RIGHT, [[0], [8]]], "run 3 of request 0 differs from run 1 at token 0"),
        ([RIGHT, [[5, 6, 7, 8], [8, 9]]], "run 2 of request 0 differs from run 1 at token 3"),
    ],
)
def test_wrong_outputs_fail(repeats, says):
    check = check_outputs(BATCH, repeats)
    assert check.verdict == "failed"
    assert says in check.detail


def test_spread_names_what_is_noisy():
    calm, wild = ("calm", [10.0, 10.0, 10.5]), ("wild", [10.0, 20.0, 30.0])
    assert check_spread([calm]).verdict == "ok"
    check = check_spread([calm, wild])
    assert check.verdict == "warning"
    assert "wild 50%" in check.detail
    assert "calm" not in check.detail
    assert check_spread([("once", [1.0])]).verdict == "warning"


def test_a_slow_first_run_was_still_warming_up():
    assert check_warm_up([1.2, 1.0, 1.0]).verdict == "ok"
    assert check_warm_up([1.5, 1.0, 1.0]).verdict == "warning"


def test_much_time_outside_the_executor_is_client_bound():
    assert check_client(10.0, 9.8).verdict == "ok"
    check = check_client(10.0, 8.0)
    assert check.verdict == "warning"
    assert check.detail == "20.0% of the time outside the executor: client-bound"


def test_the_worst_check_is_shown():
    fine, doubt, wrong = Check("x", "ok", "fine"), Check("x", "warning", "doubt"), Check("x", "failed", "wrong")
    assert worst([fine, doubt, wrong]) is wrong
    assert worst([fine, doubt]) is doubt
    assert worst([fine, fine]) == Check("x", "ok", "fine; fine")


@pytest.mark.parametrize(
    ("seen", "warned"),
    [
        (Disturbance(), set()),
        (Disturbance(others=0.9), {"other load"}),
        (Disturbance(steal=0.2), {"steal"}),
        (Disturbance(throttled=3), {"throttling"}),
    ],
)
def test_what_disturbed_the_measurement_warns(seen, warned):
    checks = check_disturbance(seen)
    assert [check.name for check in checks] == ["throttling", "steal", "other load"]
    assert {check.name for check in checks if check.verdict == "warning"} == warned
    assert not any(check.verdict == "failed" for check in checks)


def test_limits_measured_beside_others_warn():
    machine = SimpleNamespace(measured_at="2026-11-25")
    assert check_limits(SimpleNamespace(machine=machine, disturbance=Disturbance())).verdict == "ok"
    assert check_limits(SimpleNamespace(machine=machine, disturbance=Disturbance(steal=0.5))).verdict == "warning"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(1.0, 0.97, "ok"), (0.5, 1.0, "warning"), (1.0, 0.79, "warning"), (1.0, 1.9, "warning")],
)
def test_a_machine_that_became_slower_warns(before, after, verdict):
    check = check_pace(before, after)
    assert (check.name, check.verdict) == ("pace", verdict)
    assert f"{before:.0%}" in check.detail
