from headrace.plan.host import Host
from headrace.plan.report import limit_lines, machine_lines, size
from headrace.plan.roofline import limits_for_model
from tests.unit.plan.machines import FORMATS, machine, small


def test_sizes():
    assert [size(n) for n in (512, 48 << 10, 5 << 18, 8 << 30)] == ["0 KiB", "48 KiB", "1.2 MiB", "8 GiB"]


def test_limits_that_hold_are_shown():
    lines = machine_lines(machine(cpu_quota=0.5, memory_limit=1 << 30), Host.here(), forced=True)
    text = "\n".join(lines)
    assert "quota 0.5 cores" in text
    assert "the control group allows 1 GiB" in text
    assert "amx (HEADRACE_ISA)" in text
    assert "bf16 products     8,000 GFLOP/s" in text


def test_a_machine_that_tells_little():
    text = "\n".join(machine_lines(machine(caches={}), Host.here(), forced=False))
    assert "no quota" in text
    assert "caches            unknown" in text


def test_the_table_has_a_column_for_each_arithmetic():
    made = machine()
    limits = {name: limits_for_model(small(), FORMATS, made, name) for name in ("bf16x2", "int8")}
    lines = limit_lines(limits, "bf16x2")
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert lines[0].split() == ["tokens/s", "at", "best", "bf16x2", "(kernels)", "int8"]
    assert lines[1].split()[0] == "decode1"
    assert lines[1].split()[2::2] == ["memory", "memory"]
    assert lines[-1].split()[0] == "prefill2048"
