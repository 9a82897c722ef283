"""What to quantize, to which scheme, by which method."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from headrace.base.errors import InvalidRequestError
from headrace.graph.ir import Graph
from headrace.numerics.schemes import (
    GGUF_NAMES,
    Float8Scheme,
    GgufScheme,
    IntegerScheme,
    Scheme,
    group_size_in,
    scheme_named,
)

METHODS = ("rtn", "gptq", "awq", "awq+gptq", "smoothquant")
PLAIN = "bf16"
"""In place of a format in `Recipe.mixed`: not quantized."""

_ACTIVATIONS = ("f32", "int8")


def default_method(format_name: str) -> str:
    """Moved scale, then GPTQ where it rounds to such a format."""
    return "awq+gptq" if _fitted(scheme_named(format_name)) else "awq"


def _fitted(scheme: Scheme) -> bool:
    return isinstance(scheme, IntegerScheme | GgufScheme)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        format: of the matrices of all linear layers but the logits (`scheme_named`).
        method: ``rtn`` rounds each value to the nearest; ``gptq`` lets later columns of a matrix make up for the
            rounding of earlier ones (arXiv:2210.17323); ``awq`` first moves scale from weights to the norm before them,
            where inputs are large (arXiv:2306.00978); ``awq+gptq``, one after the other; ``smoothquant`` moves scale
            for what 8-bit inputs lose (arXiv:2211.10438), and asks for int8 on both sides.
        activation: how the outcome will be served, and so is judged: ``f32``, or ``int8`` as without AMX.
        ignore: shell-style patterns of parameter names to leave as they are; each must match something.
        logits: a format for the logits' matrix, and the embedding table if it is the same; None leaves them.
        mixed: formats of single matrices, by name, in place of `format`; `PLAIN` leaves one as it is.
        aim: what `mixed` was chosen for, for the title.
    """

    format: str = "int4-g32"
    method: str = "rtn"
    activation: str = "f32"
    ignore: tuple[str, ...] = ()
    logits: str | None = None
    mixed: tuple[tuple[str, str], ...] = ()
    aim: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidRequestError(f"Method {self.method!r} is not known.", f"Use one of {', '.join(METHODS)}.")
        if self.activation not in _ACTIVATIONS:
            raise InvalidRequestError(
                f"Activations {self.activation!r} are not judged.", f"Use one of {', '.join(_ACTIVATIONS)}."
            )
        if self.logits is not None and isinstance(scheme_named(self.logits), GgufScheme) != self.is_gguf:
            raise InvalidRequestError(
                f"{self.format} and {self.logits} are not held by the same kind of file.",
                f"Use two of GGUF's ({', '.join(GGUF_NAMES)}), or none of them.",
            )
        used = {self.format, *(name for _, name in self.mixed if name != PLAIN)}
        schemes = {name: scheme_named(name) for name in used}
        for name, scheme in schemes.items():
            if self.fits and not _fitted(scheme):
                raise InvalidRequestError(f"GPTQ does not round to {name}.", "Use an integer format, or rtn or awq.")
        if self.method == "smoothquant":
            self._check_smoothquant(schemes)

    def _check_smoothquant(self, schemes: dict[str, Scheme]) -> None:
        for name, scheme in schemes.items():
            if not isinstance(scheme, IntegerScheme) or scheme.bits != 8:
                raise InvalidRequestError(
                    f"SmoothQuant is for weights of 8 bits, not {name}.",
                    "Use --format int8-channel, or another method.",
                )
        if self.activation != "int8":
            raise InvalidRequestError(
                "SmoothQuant is for activations of 8 bits.", "Leave --activation out, or use int8."
            )

    @property
    def is_gguf(self) -> bool:
        """Whether it makes a GGUF file; else a folder."""
        return isinstance(scheme_named(self.format), GgufScheme)

    @property
    def fits(self) -> bool:
        """Whether later columns of a matrix make up for earlier ones, by the inputs that they meet."""
        return self.method in ("gptq", "awq+gptq")

    @property
    def moves_scale(self) -> bool:
        """Whether a matrix makes sense only with the norm before it."""
        return self.method in ("awq", "awq+gptq", "smoothquant")

    @property
    def executor_activation(self) -> str:
        """What an executor is told to serve it so: f32 is whatever costs no accuracy and is fastest there."""
        return "auto" if self.activation == "f32" else self.activation

    @property
    def title(self) -> str:
        """Short, for tables: ``int4-g32 gptq``."""
        served = "" if self.activation == "f32" else f", activations {self.activation}"
        return f"{self.aim or self.format} {self.method}{served}"

    def matrices(self, graph: Graph) -> list[str]:
        """The linear layers' matrices that no pattern ignores, the logits' among them, in the graph's order.

        Raises InvalidRequestError for a pattern that matches none.
        """
        names = graph.linear_matrices
        for pattern in self.ignore:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InvalidRequestError(
                    f"The pattern {pattern!r} matches no matrix.", f"Names are like {_examples(names)}."
                )
        return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.ignore)]

    def schemes(self, graph: Graph) -> dict[str, Scheme]:
        """The scheme of every parameter that shall be quantized, in the graph's order.

        Raises InvalidRequestError for a pattern that matches no matrix, or groups that do not divide one.
        """
        matrices = self.matrices(graph)
        single = dict(self.mixed)
        assert single.keys() <= set(matrices) - graph.logits_params, "mixed formats are of the graph's matrices"
        found: dict[str, Scheme] = {}
        for name in matrices:
            format_name = self.logits if name in graph.logits_params else single.get(name, self.format)
            if format_name is not None and format_name != PLAIN:
                found[name] = scheme_named(format_name)
        _check_groups(graph, found)
        if not found:
            raise InvalidRequestError("Nothing is left to quantize.", "Ignore less, or allow fewer bits or more KL.")
        return found


def _examples(names: Sequence[str]) -> str:
    return ", ".join([*names[:2], names[-1]])


def _check_groups(graph: Graph, schemes: dict[str, Scheme]) -> None:
    for name, scheme in schemes.items():
        if not isinstance(scheme, Float8Scheme):
            try:
                group_size_in(scheme, graph.params[name].shape[1])
            except InvalidRequestError as error:
                remedy = f"{error.remedy} Or ignore it."
                if not isinstance(scheme, IntegerScheme):
                    remedy = f"Ignore it (--ignore {name}), or use an integer format with groups that do."
                raise InvalidRequestError(f"{name}: {error.cause}", remedy) from error
