"""One benchmark from its arguments to its report: load what it needs, measure, and say on what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.bench import kernels as kernel_bench
from headrace.bench import roofline as roofline_bench
from headrace.bench import startup as startup_bench
from headrace.bench import waterfall as waterfall_bench
from headrace.bench.environment import environment, model_facts
from headrace.bench.latency import latency
from headrace.bench.limits import Limits, Roofs
from headrace.bench.report import Findings, Report
from headrace.bench.throughput import prefill, throughput
from headrace.bench.validity import check_disturbance, check_limits, check_pace
from headrace.bench.workloads import uniform
from headrace.formats.resolve import resolve_model
from headrace.llm.config import LLMConfig
from headrace.llm.llm import LLM
from headrace.llm.loader import load_graph, main_kernel_kind, stored_formats
from headrace.plan.calibrate import calibrate_here, pace
from headrace.plan.load import watch
from headrace.plan.machine import Machine

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Session:
    """What a benchmark is run on.

    Attributes:
        model: as the user names it.
        options: arguments of `LLM`.
        settings: the benchmark's own arguments.
        matrices: the different ones that the model multiplies by.
        limits: what this machine could do with this model.
    """

    model: str | None
    options: Mapping[str, Any]
    settings: Settings
    matrices: Sequence[kernel_bench.Shape]
    limits: Limits

    def load(self, **changed: Any) -> LLM:
        """The model, without a prefix cache: every repeat computes the same."""
        return LLM(self.model, **{**self.options, "enable_prefix_caching": False, **changed})

    @property
    def repeats(self) -> int:
        repeats: int = self.settings["repeats"]
        return repeats

    def lengths(self) -> dict[str, int]:
        return {name: self.settings[name] for name in ("input_len", "output_len")}

    def with_room_for(self, num_seqs: int) -> dict[str, int]:
        """Options under which so many sequences run at once."""
        return {name: max(self.options[name], num_seqs) for name in ("max_num_seqs", "max_num_batched_tokens")}


def measure(benchmark: str, options: Mapping[str, Any], settings: Settings) -> tuple[Report, Roofs]:
    """Run a benchmark of `BENCHMARKS`.

    Args:
        options: `model`, and arguments of `LLM`.
        settings: the benchmark's own, and `repeats`.

    Returns what was found, and the machine's ceilings. Raises HeadraceError subclasses of whatever cannot be run.
    """
    model, rest = options["model"], {name: value for name, value in options.items() if name != "model"}
    path = resolve_model(model)
    calibration, host = calibrate_here(num_threads=rest["num_threads"])
    session = _session(model, rest, settings, calibration.machine)
    before = pace(calibration.machine)
    with watch(host) as seen:
        findings = BENCHMARKS[benchmark](session)
    speed = check_pace(before, pace(calibration.machine))
    around = [*check_disturbance(seen.disturbance()), check_limits(calibration), speed]
    report = Report(
        benchmark=benchmark,
        environment=environment(calibration.machine),
        model=model_facts(model, path),
        settings={**rest, **settings},
        findings=replace(findings, checks=[*findings.checks, *around]),
    )
    return report, session.limits.roofs()


def _session(model: str | None, options: Mapping[str, Any], settings: Settings, machine: Machine) -> Session:
    graph, weights = load_graph(model, fused=True)
    matrices = kernel_bench.shapes(graph, weights)
    limits = Limits(
        machine=machine,
        graph=graph,
        formats=stored_formats(graph, weights, options["kv_format"]),
        main_kind=main_kernel_kind(graph, weights),
        activation=options["activation"],
        max_batched_tokens=options["max_num_batched_tokens"],
    )
    return Session(model, options, settings, matrices, limits)


def _latency(session: Session) -> Findings:
    with session.load() as llm:
        return latency(llm, session.limits, **session.lengths(), repeats=session.repeats)


def _throughput(session: Session) -> Findings:
    num_seqs = session.settings["num_seqs"]
    with session.load(**session.with_room_for(max(num_seqs))) as llm:
        return throughput(llm, session.limits, num_seqs=num_seqs, **session.lengths(), repeats=session.repeats)


def _prefill(session: Session) -> Findings:
    with session.load() as llm:
        return prefill(llm, session.limits, lengths=session.settings["lengths"], repeats=session.repeats)


def _kernels(session: Session) -> Findings:
    machine = session.limits.machine
    return kernel_bench.kernels(
        session.matrices,
        session.limits,
        rows=session.settings["rows"],
        isa=machine.isa,
        activation=session.options["activation"],
        num_threads=machine.num_threads,
        repeats=session.repeats,
    )


def _startup(session: Session) -> Findings:
    batch = uniform(1, session.settings["input_len"], 1, session.limits.vocab_size)
    return startup_bench.startup(session.model, session.options, batch, repeats=session.repeats)


def _waterfall(session: Session) -> Findings:
    names = ("num_seqs", "prefix_len", "own_len", "output_len", "seconds_per_bar")
    load = waterfall_bench.Load(**{name: session.settings[name] for name in names})
    stored = list(dict.fromkeys(shape.tensor.format.name for shape in session.matrices))
    machine = session.limits.machine
    bars = waterfall_bench.settings(stored, load, session.options, isa=machine.isa, num_threads=machine.num_threads)
    return waterfall_bench.waterfall(session.model, bars, load, session.limits, repeats=session.repeats)


def _roofline(session: Session) -> Findings:
    num_seqs = session.settings["num_seqs"]
    cases = roofline_bench.works(
        session.limits.vocab_size,
        num_seqs=num_seqs,
        **session.lengths(),
        block_size=LLMConfig.block_size,
    )
    room = session.with_room_for(max(num_seqs))

    def load(with_prefix_cache: bool) -> LLM:
        return session.load(**room, enable_prefix_caching=with_prefix_cache)

    return roofline_bench.roofline(load, session.limits, cases, repeats=session.repeats)


BENCHMARKS: Mapping[str, Callable[[Session], Findings]] = {
    "latency": _latency,
    "throughput": _throughput,
    "prefill": _prefill,
    "kernels": _kernels,
    "startup": _startup,
    "waterfall": _waterfall,
    "roofline": _roofline,
}
