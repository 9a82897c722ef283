"""The card that travels with a quantized model: what was done, what it cost in quality, what it gained."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.compress.gate import Bin, Evaluation
from headrace.compress.planner import Planned
from headrace.compress.recipe import Recipe

_SHOWN = 20  # matrices, of those in the JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """One matrix's part.

    Attributes:
        name: the parameter's.
        error: relative squared error of its outputs over the calibration.
        kl_mean: mean KL(source || model) if it alone were quantized; None: not measured.
    """

    name: str
    error: float
    kl_mean: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """See the module. Sizes in bytes, speeds in tokens/s of one decoding sequence on `machine`, times in seconds.

    Attributes:
        source_bytes, quantized_bytes: of all tensors in the files.
        source_memory, quantized_memory: of the weights in the native executor, packed for `machine`.
        bits_per_weight: of the quantized matrices in the files, scales and zero points counted.
        calibration: kinds of text (`headrace.align.samples`).
        planned: how formats were chosen matrix by matrix; None: they were not.
        peak_memory: largest resident size of the process, pages of mapped files and libraries included.
    """

    source: str
    recipe: Recipe
    calibration_tokens: int
    calibration: Sequence[str]
    evaluation: Evaluation
    source_bytes: int
    quantized_bytes: int
    source_memory: int
    quantized_memory: int
    bits_per_weight: float
    source_speed: float
    quantized_speed: float
    blame: Sequence[Blame]
    planned: Planned | None
    seconds: float
    peak_memory: int
    machine: str
    date: str
    command: str

    def to_json(self) -> str:
        """All of it, as JSON."""
        held = asdict(self)
        if held["planned"] is not None:
            del held["planned"]["recipe"]  # it is the card's
        return json.dumps(held, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """To be read."""
        found = self.evaluation.divergence
        lines = [
            f"# {self.source}, {self.recipe.title}",
            "",
            f"`{self.command}`, {self.date}, {self.machine}. Calibrated on {self.calibration_tokens:,} tokens"
            f" ({', '.join(self.calibration)}), judged on {found.num_positions:,} positions of other texts,"
            f" against the source model{self._served}.",
            "",
            *_table(
                ("", "source", "quantized"),
                [
                    ("bytes in files", f"{self.source_bytes:,}", f"{self.quantized_bytes:,}"),
                    ("bits per quantized weight", "", f"{self.bits_per_weight:.2f}"),
                    ("bytes in memory, packed", f"{self.source_memory:,}", f"{self.quantized_memory:,}"),
                    ("perplexity", f"{found.reference_perplexity:.3f}", f"{found.perplexity:.3f}"),
                    ("decoding, tokens/s", f"{self.source_speed:.1f}", f"{self.quantized_speed:.1f}"),
                ],
            ),
            "",
            *_table(
                ("against the source", "mean", "p50", "p99", "max"),
                [
                    ("KL, nats", f"{found.kl_mean:.4g}", "", f"{found.kl_p99:.4g}", f"{found.kl_max:.4g}"),
                    (
                        "\\|Δ log-probability\\|",
                        f"{found.logprob_delta_mean:.4g}",
                        f"{found.logprob_delta_p50:.4g}",
                        f"{found.logprob_delta_p99:.4g}",
                        f"{found.logprob_delta_max:.4g}",
                    ),
                ],
            ),
            "",
            f"The likeliest token is the same at {100 * found.top1_agreement:.2f} % of positions.",
            "",
            *self._formats(),
            "## Where it errs",
            "",
            *_bins("kind of text", self.evaluation.by_kind),
            "",
            *_bins("probability of the token in the source", self.evaluation.by_rarity),
            "",
            *_bins("position in the text", self.evaluation.by_position),
            "",
            "## Which matrices cost most",
            "",
            *_table(
                ("matrix", "relative error of its outputs", "KL if it alone were quantized"),
                [
                    (b.name, f"{b.error:.3g}", "" if b.kl_mean is None else f"{b.kl_mean:.3g}")
                    for b in self.blame[:_SHOWN]
                ],
            ),
            "",
            f"It took {self.seconds:.0f} s and at most {self.peak_memory / 2**20:,.0f} MiB.",
            "",
        ]
        return "\n".join(lines)

    @property
    def _served(self) -> str:
        activation = self.recipe.activation
        return "" if activation == "f32" else f" in f32; its own linears read {activation}, as without AMX"

    def _formats(self) -> list[str]:
        """How many matrices have which format, if they were chosen one by one."""
        if self.planned is None:
            return []
        counts = Counter(format_name for _, format_name in self.recipe.mixed)
        return [
            "## Formats",
            "",
            *_table(("format", "matrices"), sorted(counts.items())),
            "",
            f"Chosen for {self.recipe.aim}: {self.planned.bits:.3f} bits a weight of these matrices, bf16 being 16."
            f" Predicted KL: {self.planned.kl:.4g}.",
            "",
        ]


def _bins(title: str, bins: Sequence[Bin]) -> list[str]:
    rows = [(b.name, f"{b.count:,}", f"{b.kl_mean:.4g}", f"{b.logprob_delta_mean:.4g}") for b in bins]
    return _table((title, "positions", "mean KL", "mean \\|Δ log-probability\\|"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
