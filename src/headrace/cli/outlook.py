"""What a machine can do with a model at best: joins the model's plan and the machine's limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.base.errors import CapacityError
from headrace.llm.config import LLMConfig
from headrace.llm.loader import main_kernel_kind, plan_model, stored_formats
from headrace.llm.memory import MemoryPlan
from headrace.plan.machine import Machine
from headrace.plan.report import limit_lines, size
from headrace.plan.roofline import WorkloadLimit, kernel_arithmetic, limits_for_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A model on a machine, before anything of it is loaded.

    Attributes:
        name: the model's.
        stored_bytes: of its parameters in its file.
        memory: what loading it would plan for, or why it does not fit.
        context_len: cached tokens of each decoding sequence.
        arithmetic: the one that the kernels for its weights use.
        limits: the usual workloads at best, by arithmetic.
    """

    name: str
    stored_bytes: int
    memory: MemoryPlan | CapacityError
    context_len: int
    arithmetic: str
    limits: Mapping[str, Sequence[WorkloadLimit]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        memory = self.memory
        return {
            "name": self.name,
            "stored_bytes": self.stored_bytes,
            "memory": {"cause": memory.cause, "remedy": memory.remedy}
            if isinstance(memory, CapacityError)
            else {
                "weight_bytes": memory.weight_bytes,
                "kv_bytes": memory.kv_bytes,
                "max_model_len": memory.max_model_len,
            },
            "context_len": self.context_len,
            "arithmetic": self.arithmetic,
            "limits": {
                arithmetic: {
                    limit.name: {
                        "tokens_per_second": limit.tokens_per_second,
                        "seconds": limit.step.seconds,
                        "seconds_in_turn": limit.step.seconds_in_turn,
                        "bound": limit.step.bound,
                        "flops": limit.step.flops,
                        "bytes": limit.step.bytes,
                    }
                    for limit in limits
                }
                for arithmetic, limits in self.limits.items()
            },
        }

    def lines(self) -> list[str]:
        """For people."""
        if isinstance(self.memory, CapacityError):
            memory = f"does not fit: {self.memory.cause} {self.memory.remedy}"
        else:
            memory = (
                f"{size(self.memory.weight_bytes)} of weights, {size(self.memory.kv_bytes)} of KV cache for contexts of"
                f" up to {self.memory.max_model_len:,} tokens, of {size(self.memory.available)} free"
            )
        return [
            f"{'model':<18}{self.name}, {size(self.stored_bytes)} stored",
            f"{'memory plan':<18}{memory}",
            "",
            f"Decode with {self.context_len:,} cached tokens a sequence, prefill of one prompt, and what bounds each:",
            "",
            *limit_lines(self.limits, self.arithmetic),
        ]


def outlook(model: str, machine: Machine, context_len: int) -> Outlook:
    """Raises HeadraceError subclasses for a model that cannot be found or understood."""
    plan = plan_model(model, LLMConfig())
    used = kernel_arithmetic(machine.isa, kind=main_kernel_kind(plan.graph, plan.weights))
    formats = stored_formats(plan.graph, plan.weights)
    return Outlook(
        name=plan.name,
        stored_bytes=sum(formats.param_bytes.values()),
        memory=plan.memory,
        context_len=context_len,
        arithmetic=used,
        limits={
            arithmetic: limits_for_model(plan.graph, formats, machine, arithmetic, context_len=context_len)
            for arithmetic in dict.fromkeys([used, *machine.matrix_rate])
        },
    )
