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

METHODS = ("rtn", "gptq", "awq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        format: of the matrices of all linear layers but the logits (`scheme_named`).
        method: ``rtn`` rounds each value to the nearest; ``gptq`` lets later columns of a matrix make up for the
            rounding of earlier ones (arXiv:2210.17323); ``awq`` first moves scale from weights to the norm before them,
            where inputs are large (arXiv:2306.00978).
        ignore: shell-style patterns of parameter names to leave as they are; each must match something.
        logits: a format for the logits' matrix, and the embedding table if it is the same; None leaves them.
    """

    format: str = "int4-g32"
    method: str = "rtn"
    ignore: tuple[str, ...] = ()
    logits: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidRequestError(f"Method {self.method!r} is not known.", f"Use one of {', '.join(METHODS)}.")
        scheme = scheme_named(self.format)
        if self.logits is not None and isinstance(scheme_named(self.logits), GgufScheme) != self.is_gguf:
            raise InvalidRequestError(
                f"{self.format} and {self.logits} are not held by the same kind of file.",
                f"Use two of GGUF's ({', '.join(GGUF_NAMES)}), or none of them.",
            )
        if self.method == "gptq" and not isinstance(scheme, IntegerScheme | GgufScheme):
            raise InvalidRequestError(f"GPTQ does not round to {self.format}.", "Use an integer format, or rtn.")

    @property
    def is_gguf(self) -> bool:
        """Whether it makes a GGUF file; else a folder."""
        return isinstance(scheme_named(self.format), GgufScheme)

    @property
    def title(self) -> str:
        """Short, for tables: ``int4-g32 gptq``."""
        return f"{self.format} {self.method}"

    def schemes(self, graph: Graph) -> dict[str, Scheme]:
        """The scheme of every parameter that shall be quantized, in the graph's order.

        Raises InvalidRequestError for a pattern that matches no matrix, or groups that do not divide one.
        """
        matrices = graph.linear_matrices
        for pattern in self.ignore:
            if not any(fnmatchcase(name, pattern) for name in matrices):
                raise InvalidRequestError(
                    f"The pattern {pattern!r} matches no matrix.", f"Names are like {_examples(matrices)}."
                )
        found: dict[str, Scheme] = {}
        for name in matrices:
            format_name = self.logits if name in graph.logits_params else self.format
            if format_name is not None and not any(fnmatchcase(name, pattern) for pattern in self.ignore):
                found[name] = scheme_named(format_name)
        _check_groups(graph, found)
        if not found:
            raise InvalidRequestError("Nothing is left to quantize.", "Ignore less.")
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
