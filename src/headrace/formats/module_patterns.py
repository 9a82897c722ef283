"""Which modules a quantization config means: names, patterns, and what must hold between them and what is stored."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from headrace.base.errors import CheckpointError

Match = Callable[[str, str], bool]
"""(pattern, module name): whether the one means the other."""


def matches_name(pattern: str, name: str) -> bool:
    """compressed-tensors' rule: the name itself, or after ``re:`` an expression that it begins with.

    Raises CheckpointError for what is no regular expression.
    """
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.match(pattern[3:], name) is not None
    except re.error as error:
        raise CheckpointError(
            f"{pattern!r} is no regular expression: {error}.", "Correct it in the quantization config."
        ) from error


def matches_wildcard(pattern: str, name: str) -> bool:
    """ModelOpt's rule: shell-style wildcards."""
    return fnmatchcase(name, pattern)


def matches_components(pattern: str, name: str) -> bool:
    """The rule of ``modules_to_not_convert``: one or more consecutive components of the name."""
    return f".{pattern}." in f".{name}."


def check_ignored(
    where: str, patterns: Sequence[str], match: Match, modules: Iterable[str], quantized: Iterable[str]
) -> None:
    """Hold a list of modules that are not quantized against what is stored.

    Args:
        where: what to call the list in errors.
        patterns: the list.
        match: how it is meant.
        modules: names of all modules that have tensors.
        quantized: those that are stored quantized.

    Raises CheckpointError for a pattern that means no module, or one that is quantized.
    """
    names = _with_ancestors(modules)
    for pattern in patterns:
        if not any(match(pattern, name) for name in names):
            raise CheckpointError(
                f"{pattern!r} of {where} matches no module of the model.",
                "Correct it or take it out: misspelled, it leaves a module quantized that should not be.",
            )
    for name in quantized:
        if sparing := [pattern for pattern in patterns if match(pattern, name)]:
            raise CheckpointError(
                f"{name} is stored quantized, although {sparing[0]!r} of {where} spares it.",
                "Correct the list, or quantize the model again: what the module holds is not what was meant.",
            )


def _with_ancestors(modules: Iterable[str]) -> set[str]:
    """All names that there are. Every language model has an lm_head; tied to the embeddings, it is not stored."""
    names = {"lm_head"}
    for name in modules:
        components = name.split(".")
        names.update(".".join(components[: i + 1]) for i in range(len(components)))
    return names
