"""What is compared: a model run in a certain way, named in one line."""

from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from urllib.parse import parse_qsl

from headrace.base.errors import InvalidRequestError
from headrace.engine.executor import Executor
from headrace.executors.native import ACTIVATIONS, NativeExecutor
from headrace.executors.native_quantize import quantize_tensor
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
_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
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
        fused: whether ops are merged.
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
    fused: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("executor", ("native", "torch")),
            ("activation", ACTIVATIONS),
            ("kv", KV_FORMATS),
            ("dtype", _DTYPES),
        ):
            if getattr(self, name) not in known:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not known.", f"Use one of {', '.join(known)}."
                )
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
    if text.startswith(("http://", "https://", "hf:")):
        raise InvalidRequestError(
            f"{text!r}: servers and Hugging Face models are not compared yet.", "Give a model that headrace loads."
        )
    model, _, options = text.partition("?")
    known = [f.name for f in fields(Subject) if f.name != "model"]
    given: dict[str, object] = {}
    try:
        pairs = parse_qsl(options, keep_blank_values=True, strict_parsing=bool(options))
    except ValueError as error:
        raise InvalidRequestError(f"{text!r}: {error}.", "Write MODEL?key=value&key=value.") from error
    for key, value in pairs:
        if key not in known or key in given:
            raise InvalidRequestError(
                f"{text!r}: {key!r} is {'given twice' if key in given else 'not known'}.",
                f"Use {', '.join(known)}, each once.",
            )
        given[key] = _value(key, value)
    return replace(Subject(model=model), **given)  # type: ignore[arg-type]


SETTINGS = (
    *((f.name,) for f in fields(Subject) if f.name not in ("weights", "only")),
    ("weights", "only"),
)
"""A subject's fields by what they set together: which matrices a scheme is for means nothing without the scheme."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A subject's model, not yet packed."""

    subject: Subject
    graph: Graph
    weights: Weights
    tokenizer: Tokenizer

    def executor(self, length: int) -> AbstractContextManager[Executor]:
        """An executor for sequences of up to `length` tokens, each in one step, all rows sampled."""
        subject = self.subject
        num_blocks = -(-length // _BLOCK_SIZE)
        if subject.executor == "torch":
            from headrace.executors.torch_executor import TorchExecutor

            return closing(
                TorchExecutor(
                    self.graph,
                    self.weights,
                    num_blocks=num_blocks,
                    block_size=_BLOCK_SIZE,
                    kv_format=subject.kv,
                    dtype=subject.dtype,
                )
            )
        return closing(
            NativeExecutor(
                self.graph,
                self.weights,
                num_blocks=num_blocks,
                block_size=_BLOCK_SIZE,
                kv_format=subject.kv,
                activation=subject.activation,
                num_threads=subject.threads or None,
                isa=subject.isa or None,
                fuse=subject.fused,
                max_batched_tokens=length,
                max_num_seqs=length,
                max_model_len=length,
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
    return value
