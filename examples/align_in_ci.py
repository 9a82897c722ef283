"""A budget for precision, kept by CI: exit code 1 when a change in how a model is run costs more than was agreed.

    python examples/align_in_ci.py                                        # two candidates: one passes, one does not
    python examples/align_in_ci.py 'smollm2-135m?activation=int8&kv=int4'     # a CI job for your own: exits with 0 or 1

The reference is the torch executor in f32. A candidate that passes costs one comparison. One that fails is taken apart,
as the log of a failed job should be: which of its settings costs how much, and which nodes of the graph err by
themselves, rather than hand on what they were given.
"""

import sys

from headrace.align.alignment import align, find_causes, token_windows
from headrace.align.sides import side_named, tokenizer_of

REFERENCE = "smollm2-135m?executor=torch&kv=f32"
BUDGET = {"kl": 0.02, "dlogprob_p99": 0.7}

SOUND = "smollm2-135m?activation=int8&kv=int8"
COARSE = "smollm2-135m?activation=int8&kv=int4"  # saves another 40 % of the cache


def main(candidates: list[str]) -> int:
    if candidates:
        return max([gate(each) for each in candidates])
    assert gate(SOUND) == 0
    assert gate(COARSE) == 1, "the budget would let anything pass"
    return 0


def gate(candidate: str) -> int:
    """The exit code of a job that checks one candidate."""
    a, b = side_named(REFERENCE), side_named(candidate)
    tokens = token_windows(tokenizer_of(a, b), None, count=2, length=32)
    found = align(a, b, tokens, threshold=0.01, by_cause=False)
    d = found.divergence
    print(f"{candidate}: KL {d.kl_mean:.4f}, |Δ log-probability| p99 {d.logprob_delta_p99:.3f}", end=" ")
    exceeded = found.exceeded(BUDGET)
    if not exceeded:
        print("– within the budget")
        return 0
    print(f"– beyond the budget: {'; '.join(exceeded)}")
    for cause in find_causes(a, b, tokens, found.divergence):
        print(f"  with {cause.name}={cause.a} instead of {cause.b}, {100 * cause.explains:.0f} % of the gap is gone")
    worst = sorted(found.nodes, key=lambda node: -node.own)[:3]
    print(f"  most error of their own: {', '.join(f'{node.name} ({node.own:.3f})' for node in worst)}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
