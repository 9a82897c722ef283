"""A jinja environment for templates that come with downloaded models: no escape to Python, bounded time and size.

jinja's own sandbox closes the ways to Python's internals and caps ``range``. It does not bound how long a template runs
or how large its strings grow; this environment does, at every loop iteration, call, lookup, operator and concatenation.
"""

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0
"""Longest time that one rendering may take; real templates take under a millisecond per message."""
MAX_CHARS = 16 * 2**20
"""Longest text that a template may build, as its output or on the way."""


class RefusalError(TemplateError):
    """A template's own ``raise_exception``."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates as Transformers does, and bounds their rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
        self._thread = threading.local()
        self.filters["tojson"] = _tojson
        self.filters["_ticking"] = self._ticking
        self.filters["_concat"] = lambda values: self.concat(map(str, values))
        for name in ("batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap"):
            self.filters[name] = _filter(name)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # a generator of filler text has no place in a prompt

    def start_clock(self) -> None:
        """Begin a rendering in this thread."""
        self._thread.deadline = time.monotonic() + MAX_SECONDS

    def check_clock(self) -> None:
        """Raise SecurityError once this thread's rendering has taken too long."""
        if time.monotonic() > self._thread.deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} s")

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """How compiled templates join text: the output of a macro or of a ``set`` block, say."""
        pieces = list(pieces)
        _check_size(sum(map(len, pieces)))
        return "".join(pieces)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_clock()
        if isinstance(obj, str) and attribute in ("format", "format_map"):
            # Nested fields take a width from an argument; doubled braces are text.
            _refuse_widths(r"\{[^{}]*(\{|\d{5})", obj.replace("{{", "").replace("}}", ""))
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_clock()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (jinja's names)
        __self.check_clock()
        if isinstance(owner := getattr(__obj, "__self__", None), str):
            _check_method(__obj.__name__, owner, (*args, *kwargs.values()))
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.check_clock()
        if operator == "*":
            for many, text in ((left, right), (right, left)):
                if isinstance(many, int) and hasattr(text, "__len__"):
                    _check_size(many * len(text))
        elif operator == "**" and max(abs(left), abs(right)) > 1000:
            raise SecurityError("it computes a huge number")
        elif operator == "%" and isinstance(left, str):
            _refuse_widths(_PERCENT_WIDTH, left)
        return _bounded(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_ticking", [], [], None, None, lineno=loop.lineno)
        for joined in list(tree.find_all(nodes.Concat)):
            # In place, since a node does not know its parent: what is left to concatenate is one text.
            parts = nodes.List(joined.nodes, lineno=joined.lineno)
            joined.nodes = [nodes.Filter(parts, "_concat", [], [], None, None, lineno=joined.lineno)]
        return tree

    def _ticking(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.check_clock()
            yield value


class _GenerationBlock(Extension):
    """``{% generation %}``: marks what the assistant said, for training; renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise RefusalError(str(message))


def _strftime_now(form: str) -> str:
    _refuse_widths(_PERCENT_WIDTH, form)
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    if isinstance(indent, int) and indent > 100:
        raise SecurityError("it indents by a huge width")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _filter(name: str) -> Callable[..., Any]:
    """One of jinja's filters that can make much of little, refused where it would."""
    plain = FILTERS[name]

    @functools.wraps(plain)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        at = next((index for index, value in enumerate(args) if isinstance(value, str)), len(args))
        _check_method(name, "".join(args[at : at + 1]), (*args[:at], *args[at + 1 :], *kwargs.values()))
        return _bounded(plain(*args, **kwargs))

    return bounded


def _check_method(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Refuse a string operation by the largest text that it could make."""
    numbers = [abs(value) for value in args if isinstance(value, int)]
    if name in ("expandtabs", "indent"):
        _check_size(len(text) * max(numbers, default=8))
    elif name == "replace":
        old, new = ([value for value in args if isinstance(value, str)] + ["", ""])[:2]
        _check_size(text.count(old) * len(new))
    elif name == "join":
        for values in (value for value in args if isinstance(value, list | tuple)):
            _check_size(len(text) * len(values) + sum(len(v) for v in values if isinstance(v, str)))
    elif name == "format":
        _refuse_widths(_PERCENT_WIDTH, text)
    _check_size(max(numbers, default=0))


_PERCENT_WIDTH = r"%[^a-zA-Z%]*(\d{5}|\*)"


def _refuse_widths(pattern: str, form: str) -> None:
    if re.search(pattern, form):
        raise SecurityError("it formats text with a huge width")


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_size(len(value))
    elif isinstance(value, int) and value.bit_length() > 10_000:
        raise SecurityError("it computes a huge number")
    return value


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"it builds a text of more than {MAX_CHARS:,} characters")
