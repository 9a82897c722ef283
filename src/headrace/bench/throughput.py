"""``bench throughput``: many sequences at once, of one length and of mixed lengths; and ``bench prefill``."""

from collections.abc import Sequence

from headrace.bench.limits import Limits
from headrace.bench.report import Findings, Measurement
from headrace.bench.subject import Run, decode_rates, repeated
from headrace.bench.validity import (
    Check,
    check_client,
    check_outputs,
    check_spread,
    check_warm_up,
    worst,
)
from headrace.bench.workloads import Batch, mixed, uniform
from headrace.graph.cost import Workload
from headrace.llm.llm import LLM


def throughput(
    llm: LLM, limits: Limits, *, num_seqs: Sequence[int], input_len: int, output_len: int, repeats: int
) -> Findings:
    """Decode of each number of sequences, and as many requests of mixed lengths as the greatest of them.

    Decode speed is what remains of a run of `output_len` + 1 tokens each after one of one each: prefill cancels out.
    Mixed lengths are drawn from an eighth to four times `input_len`, and from an eighth to twice `output_len`; their
    speed is all output tokens / the whole time, prefill included.
    """
    vocab_size = llm.model.executor.vocab_size
    wholes = [uniform(count, input_len, output_len + 1, vocab_size) for count in num_seqs]
    firsts = [whole.with_lengths(1) for whole in wholes]
    various = mixed(
        max(num_seqs),
        vocab_size,
        prompt_lens=(max(1, input_len // 8), 4 * input_len),
        output_lens=(max(1, output_len // 8), 2 * output_len),
    )
    batches = [*firsts, *wholes, various]
    runs = repeated(llm, batches, repeats)
    count = len(num_seqs)
    measurements = [
        _decode(whole, first_runs, whole_runs, limits, output_len)
        for whole, first_runs, whole_runs in zip(wholes, runs[:count], runs[count : 2 * count], strict=True)
    ]
    measurements.append(
        Measurement(
            name=f"mixed, {max(num_seqs)} seqs",
            unit="tok/s",
            samples=tuple(various.num_output_tokens / run.seconds for run in runs[-1][1:]),
            limit=various.num_output_tokens / limits.batch_seconds(various),
        )
    )
    # The single tokens must be the beginnings of the whole outputs.
    outputs = [
        check_outputs(whole, [*(run.outputs for run in long), *(run.outputs for run in short)])
        for whole, short, long in zip(wholes, runs[:count], runs[count : 2 * count], strict=True)
    ]
    outputs.append(check_outputs(various, [run.outputs for run in runs[-1]]))
    return _findings(measurements, worst(outputs), runs[count:])


def prefill(llm: LLM, limits: Limits, *, lengths: Sequence[int], repeats: int) -> Findings:
    """One prompt of each length, to its first token."""
    batches = [uniform(1, length, 1, llm.model.executor.vocab_size) for length in lengths]
    runs = repeated(llm, batches, repeats)
    measurements = []
    for length, batch, own in zip(lengths, batches, runs, strict=True):
        samples = tuple(length / run.seconds for run in own[1:])
        made = Measurement(
            name=f"prefill {length}", unit="tok/s", samples=samples, limit=length / limits.batch_seconds(batch)
        )
        measurements.append(made)
    outputs = [check_outputs(batch, [run.outputs for run in own]) for batch, own in zip(batches, runs, strict=True)]
    return _findings(measurements, worst(outputs), runs)


def _decode(whole: Batch, firsts: Sequence[Run], wholes: Sequence[Run], limits: Limits, output_len: int) -> Measurement:
    count, context = len(whole.prompts), len(whole.prompts[0]) + output_len // 2
    tokens = count * output_len
    return Measurement(
        name=f"decode, {count} seq{'s' if count > 1 else ''}",
        unit="tok/s",
        samples=decode_rates(tokens, [run.seconds for run in firsts[1:]], [run.seconds for run in wholes[1:]]),
        limit=count / limits.step_seconds(Workload.decode(count, context)),
    )


def _findings(measurements: Sequence[Measurement], outputs: Check, runs: Sequence[Sequence[Run]]) -> Findings:
    kept = [run for own in runs for run in own[1:]]
    rounds = [sum(each.seconds for each in turn) for turn in zip(*(own[1:] for own in runs), strict=True)]
    checks = [
        outputs,
        check_warm_up(rounds),
        check_spread([(each.name, each.samples) for each in measurements]),
        check_client(sum(run.seconds for run in kept), sum(run.execute_seconds for run in kept)),
    ]
    return Findings(measurements=measurements, checks=checks)
