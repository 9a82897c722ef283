"""A new process, from nothing to the first token of the embedded model."""

import subprocess
import sys
import time

import pytest

LIMIT_SECONDS = 2.0

SCRIPT = """
from headrace import LLM, SamplingParams
llm = LLM("smollm2-135m")
first = next(llm.stream("The capital of France is", SamplingParams(max_tokens=1, temperature=0.0)))
assert len(first.token_ids) == 1
print(llm.describe())
llm.close()
"""


def test_first_token_of_a_new_process(report_figure):
    seconds = []
    for _ in range(3):  # the best of three: other processes' noise only ever adds
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    report_figure(f"new process to first token: {min(seconds):.2f} s")
    report_figure(done.stdout.rstrip())
    assert "start " in done.stdout
    assert min(seconds) < LIMIT_SECONDS


LEAVING = """
import asyncio
from headrace import AsyncLLM, SamplingParams

async def main():
    llm = AsyncLLM("smollm2-135m")
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=1000, temperature=0.0))
    await anext(stream)
    if {leave_stream}:
        await stream.aclose()

asyncio.run(main())
"""


@pytest.mark.parametrize("leave_stream", [True, False])
def test_a_program_may_end_without_closing(leave_stream):
    """Its engine's thread is waited for: killed amid a step, it would take the process down with an abort."""
    script = LEAVING.format(leave_stream=leave_stream)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
