"""A new process, from nothing to the first token of the embedded model."""

import subprocess
import sys
import time

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
