"""What is compared: a model run in a certain way, named in one line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

import numpy as np

from headrace.align.divergence import Scores, bf16_scores
from headrace.align.forced import forced_logits, forced_values
from headrace.align.native_scoring import scoring_executor
from headrace.align.options import DTYPES, options_in
from headrace.align.taps import Tap
from headrace.base.errors import InvalidRequestError
from headrace.engine.executor import Executor
from headrace.engine.step import Float32
from headrace.executors.native import ACTIVATIONS
from headrace.executors.native_quantize import quantize_tensor
from headrace.executors.torch_numerics import Numerics
from headrace.formats.weights import Weights, matrices_in
from headrace.graph.ir import Graph
from headrace.graph.passes import fuse
from headrace.llm.loader import open_model
from headrace.llm.text_side import load_text
from headrace.numerics.kv_formats import KV_FORMATS
from headrace.numerics.schemes import scheme_named
from headrace.numerics.tensor import RawTensor
from headrace.text.tokenizer import Tokenizer

_BLOCK_SIZE = 16
_PLAIN = ("stored", "f32", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject(Numerics):
    """A model and how it is run.

    Attributes:
        model: as `headrace serve` takes it; empty: the embedded one.
        executor: ``native`` or ``torch``.
        activation, isa, threads: of the native executor, as in `LLMConfig`.
        kv: number format of cached keys and values.
        weights: ``stored``; or a format into which matrices are turned first, by rounding to nearest: ``f32``,
            ``bf16``, or a scheme's name (`headrace.numerics.schemes.scheme_named`), which leaves embedding and logits.
        only: a shell-style pattern of the names of matrices that a scheme is for.
        dtype: of the torch executor: float32, float64, bfloat16 or float16.
        device: of the torch executor, as torch names it.
        fused: whether ops are merged.
        logprobs: how log-probabilities are made of logits: ``exact``, or by a log-softmax in ``bf16``, with no KL then.
        temperature: what logits are divided by before; 1 is what servers report unless told otherwise.

    What it inherits says how the torch executor computes.
    """

    model: str = ""
    executor: str = "native"
    activation: str = "auto"
    isa: str = ""
    threads: int = 0
    kv: str = "bf16"
    weights: str = "stored"
    only: str = "*"
    dtype: str = "float32"
    device: str = "cpu"
    fused: bool = False
    logprobs: str = "exact"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        Numerics.__post_init__(self)
        if not self.is_exact and self.executor != "torch":
            raise InvalidRequestError("Ops are computed otherwise by the torch executor only.", "Add executor=torch.")
        if not 0.01 <= self.temperature <= 100:
            raise InvalidRequestError(f"temperature={self.temperature} is not from 0.01 to 100.", "Leave it out for 1.")
        for name, known in (
            ("executor", ("native", "torch")),
            ("activation", ACTIVATIONS),
            ("kv", KV_FORMATS),
            ("dtype", DTYPES),
            ("logprobs", ("exact", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not known.", f"Use one of {', '.join(known)}."
                )
        if self.device != "cpu" and self.executor != "torch":
            raise InvalidRequestError(f"The {self.executor} executor runs on the CPU.", "Add executor=torch.")
        if self.weights not in _PLAIN:
            scheme_named(self.weights)
        elif self.only != "*":
            raise InvalidRequestError(f"only={self.only!r} has no scheme to be for.", "Give weights=int4-g32, say.")

    @property
    def title(self) -> str:
        """The line that names it, without what is as always."""
        default = Subject(model=self.model)
        said = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        ]
        return f"{self.model or 'smollm2-135m'}{'?' if said else ''}{'&'.join(said)}"


def subject_named(text: str) -> Subject:
    """``MODEL?key=value&key=value``; ``native`` and ``torch`` alone mean the embedded model on that executor.

    Raises InvalidRequestError for a key or a value that is not known.
    """
    if text in ("native", "torch"):
        return Subject(executor=text)
    model, _, options = text.partition("?")
    known = [f.name for f in fields(Subject) if f.name != "model"]
    given = {key: _value(key, value) for key, value in options_in(text, options, known).items()}
    return replace(Subject(model=model), **given)  # type: ignore[arg-type]


SETTINGS = (
    *((f.name,) for f in fields(Subject) if f.name not in ("weights", "only", "inputs", "inputs_of")),
    ("weights", "only"),
    ("inputs", "inputs_of"),
)
"""A subject's fields by what they set together: which matrices a scheme is for means nothing without the scheme."""

WITH_EXECUTOR = ("device", *(f.name for f in fields(Numerics)))
"""What only one executor has, so that it goes where the executor goes."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A subject's model, not yet packed."""

    subject: Subject
    graph: Graph
    weights: Weights
    tokenizer: Tokenizer

    def scores(self, tokens: Sequence[Sequence[int]]) -> Iterator[Scores]:
        """Logits of each text, float32 ``[n, vocab]``; all of one length."""
        length = len(tokens[0])
        with self.executor(length) as executor:
            for ids in tokens:
                logits = forced_logits(executor, self.graph.output, ids, rows_per_step=length)
                if self.subject.temperature != 1:
                    logits = logits / np.float32(self.subject.temperature)
                yield bf16_scores(logits, ids) if self.subject.logprobs == "bf16" else logits

    @contextmanager
    def tapping(self, ids: Sequence[int]) -> Iterator[Tap]:
        """Values of nodes on one text; each call runs it."""
        with self.executor(len(ids)) as executor:

            def tap(names: Sequence[str]) -> Mapping[str, Float32]:
                (values,) = forced_values(executor, ids, names, rows_per_step=len(ids))
                return values

            yield tap

    def executor(self, length: int, *, at_once: int = 1) -> AbstractContextManager[Executor]:
        """An executor for `at_once` sequences of up to `length` tokens, and steps of as many, all of them sampled."""
        subject = self.subject
        if subject.executor == "torch":
            from headrace.executors.torch_executor import TorchExecutor

            return closing(
                TorchExecutor(
                    self.graph,
                    self.weights,
                    num_blocks=at_once * -(-length // _BLOCK_SIZE),
                    block_size=_BLOCK_SIZE,
                    kv_format=subject.kv,
                    dtype=subject.dtype,
                    device=subject.device,
                    numerics=subject,
                )
            )
        return closing(
            scoring_executor(
                self.graph,
                self.weights,
                length,
                at_once=at_once,
                rows_per_step=length,
                kv_format=subject.kv,
                activation=subject.activation,
                num_threads=subject.threads or None,
                isa=subject.isa or None,
                fuse=subject.fused,
            )
        )


def open_subject(subject: Subject) -> Opened:
    """Find its model. Raises as loading it does."""
    model = open_model(subject.model or None)
    graph, weights = model.graph, model.weights
    if subject.weights not in _PLAIN:
        weights = replace(weights, params={**weights.params, **_rounded(graph, weights, subject)})
    elif subject.weights != "stored":
        weights = matrices_in(subject.weights, weights)
    return Opened(subject, fuse(graph) if subject.fused else graph, weights, load_text(model.checkpoint).tokenizer)


def matrices_of(graph: Graph) -> list[str]:
    """The matrices that a subject's scheme can be for: those of all linear layers but the logits."""
    return [name for name in graph.linear_matrices if name not in graph.logits_params]


def _rounded(graph: Graph, weights: Weights, subject: Subject) -> dict[str, RawTensor]:
    """Matrices in the subject's scheme."""
    scheme, names = scheme_named(subject.weights), matrices_of(graph)
    chosen = [name for name in names if fnmatchcase(name, subject.only)]
    if not chosen:
        raise InvalidRequestError(f"only={subject.only!r} matches no matrix.", f"Names are like {names[0]}.")
    return {name: quantize_tensor(weights[name], scheme) for name in chosen}


def _value(key: str, value: str) -> object:
    if key == "threads":
        if not value.isdecimal():
            raise InvalidRequestError(f"threads={value!r} is no number.", "Give how many.")
        return int(value)
    if key == "fused":
        if value not in ("0", "1"):
            raise InvalidRequestError(f"fused={value!r} is not known.", "Use 0 or 1.")
        return value == "1"
    if key == "temperature":
        try:
            return float(value)
        except ValueError:
            raise InvalidRequestError(f"temperature={value!r} is no number.", "Write temperature=0.7.") from None
    return value
