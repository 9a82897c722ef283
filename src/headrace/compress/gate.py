"""What quantization did to a model: both versions on text that calibration never saw, and whether that is bearable."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.align.divergence import Divergence, TokenDivergence, divergence_of_rows, joined, summarize
from headrace.align.forced import forced_values
from headrace.align.native_scoring import scoring_executor
from headrace.compress.kept_logits import KeptLogits
from headrace.engine.executor import Executor
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import Float32, SampleRow, Step
from headrace.executors.native_isa import isa_rounding_inputs
from headrace.graph.ir import Graph
from headrace.graph.passes import fuse
from headrace.numerics.tensor import RawTensor

RARITIES = (("likely", 0.5, 1.0), ("plausible", 0.1, 0.5), ("unlikely", 0.01, 0.1), ("rare", 0.0, 0.01))
"""Bins of the probability that the source model gives a token: name, from, to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What a quantized model may be off by at most; None: anything.

    Attributes:
        kl: mean KL(source || quantized), nats.
        flips: share of positions whose likeliest token is another.
        perplexity: growth of the perplexity, relative: 0.1 is 10 %.
    """

    kl: float | None = 0.3
    flips: float | None = 0.3
    perplexity: float | None = 0.25

    def exceeded(self, found: Divergence) -> list[str]:
        """What is exceeded, in words; a figure that is not a number exceeds everything."""
        growth = found.perplexity / found.reference_perplexity - 1
        checks = (
            ("mean KL", found.kl_mean, self.kl),
            ("flipped likeliest tokens", 1 - found.top1_agreement, self.flips),
            ("growth of perplexity", growth, self.perplexity),
        )
        return [
            f"{name} {value:.4g} (at most {limit:g})"
            for name, value, limit in checks
            if limit is not None and not value <= limit
        ]


@dataclass(frozen=True, slots=True)
class Bin:
    """Positions of one kind: how many, mean KL, mean \\|Δ log-probability\\| of the token that follows."""

    name: str
    count: int
    kl_mean: float
    logprob_delta_mean: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A quantized model beside its source.

    Attributes:
        divergence: over all positions.
        by_kind: by the kind of text, if kinds were told.
        by_rarity: by the probability that the source gives the token (`RARITIES`).
        by_position: by quarters of a text's length.
    """

    divergence: Divergence
    by_kind: tuple[Bin, ...]
    by_rarity: tuple[Bin, ...]
    by_position: tuple[Bin, ...]


class Evaluator:
    """Puts other weights beside a model's own, on the same texts.

    The source runs once, at the first comparison, and its logits wait in a file: 0.8 GB for 16 texts of 256 tokens and
    49,152 logits each. So one model is packed at a time, and memory holds the logits of one step of each.

    Args:
        graph: the model.
        weights: the source's.
        texts: token ids, of one length.
        kinds: what kind of text each is.
        folder: where the file lies, without a name; None: where temporary files do.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        texts: Sequence[Sequence[int]],
        folder: Path | None = None,
        *,
        kinds: Sequence[str] = (),
    ) -> None:
        assert len({len(text) for text in texts}) == 1, "texts of one length"
        assert not kinds or len(kinds) == len(texts)
        self._kinds = np.array(kinds)
        self._graph = fuse(graph)
        self._texts = texts
        self._weights = weights
        self._folder = folder
        self._kept: KeptLogits | None = None

    def compare(
        self, weights: Mapping[str, RawTensor], *, num_texts: int | None = None, activation: str = "f32"
    ) -> Evaluation:
        """Teacher-force the other weights on the texts, or some of them, and hold each step against the source's.

        Args:
            activation: of the other weights' linears; the source's read f32. ``int8`` means inputs of 8 bits
                (`isa_rounding_inputs`), whatever this machine serves.

        Raises StorageError if the first comparison finds no room for the source's logits.
        """
        if self._kept is None:
            self._kept = self._source_logits()
        count = len(self._texts)
        chosen = np.linspace(0, count - 1, min(num_texts or count, count)).astype(int)
        found = []
        isa = isa_rounding_inputs(activation)
        length = len(self._texts[0])
        with closing(scoring_executor(self._graph, weights, length, activation=activation, isa=isa)) as executor:
            for i in chosen.tolist():
                text = self._texts[i]
                place, parts = i * (len(text) - 1), []
                for logits in self._steps(executor, text):
                    following = text[1 + sum(len(part.kl) for part in parts) :][: len(logits)]
                    parts.append(divergence_of_rows(self._kept.rows(place, len(logits)), logits, following))
                    place += len(logits)
                found.append(joined(parts))
        by_kind = _by_kind(found, self._kinds[chosen]) if len(self._kinds) else ()
        return Evaluation(summarize(found), by_kind, _by_rarity(found), _by_position(found))

    def _source_logits(self) -> KeptLogits:
        length = len(self._texts[0])
        kept = KeptLogits(len(self._texts) * (length - 1), self._graph.node(self._graph.output).features, self._folder)
        with closing(scoring_executor(self._graph, self._weights, length)) as executor:
            for text in self._texts:
                for logits in self._steps(executor, text):
                    kept.append(logits)
        return kept

    def _steps(self, executor: Executor, text: Sequence[int]) -> Iterator[Float32]:
        """Logits at the positions that have a next token, some at a time."""
        output = self._graph.output
        return (values[output] for values in forced_values(executor, text[:-1], (output,)))


def decode_speed(
    graph: Graph, weights: Mapping[str, RawTensor], num_tokens: int = 64, *, activation: str = "auto"
) -> float:
    """Tokens per second of one sequence on the native executor: the median step, once warm. What the plan does,
    without an engine around it."""
    length = num_tokens + 8
    row = SampleRow(SamplingParams(temperature=0.0), 0, 0)
    with closing(scoring_executor(fuse(graph), weights, length, activation=activation, kv_format="bf16")) as executor:
        block_size, seconds = executor.block_size, []
        for position in range(length):
            step = Step(
                token_ids=np.zeros(1, np.int32),
                positions=np.array([position], np.int32),
                seq_starts=np.array([0, 1], np.int32),
                context_lens=np.array([position + 1], np.int32),
                block_tables=np.arange(position // block_size + 1, dtype=np.int32)[None],
                sample_rows=np.zeros(1, np.int32),
                sampling=(row,),
            )
            start = time.perf_counter()
            executor.execute(step)
            seconds.append(time.perf_counter() - start)
    return 1 / float(np.median(seconds[8:]))


def _by_kind(found: Sequence[TokenDivergence], kinds: npt.NDArray[np.str_]) -> tuple[Bin, ...]:
    each = np.repeat(kinds, [len(text.kl) for text in found])
    return tuple(_bin(str(kind), each == kind, found) for kind in dict.fromkeys(kinds))


def _by_rarity(found: Sequence[TokenDivergence]) -> tuple[Bin, ...]:
    probability = np.exp(np.concatenate([text.reference_logprob for text in found]))
    return tuple(_bin(name, (probability > low) & (probability <= high), found) for name, low, high in RARITIES)


def _by_position(found: Sequence[TokenDivergence]) -> tuple[Bin, ...]:
    length = len(found[0].kl)
    quarter = np.concatenate([np.arange(len(text.kl)) * 4 // length for text in found])
    names = [f"{length * i // 4} to {length * (i + 1) // 4 - 1}" for i in range(4)]
    return tuple(_bin(name, quarter == i, found) for i, name in enumerate(names))


def _bin(name: str, chosen: npt.NDArray[np.bool_], found: Sequence[TokenDivergence]) -> Bin:
    kl = np.concatenate([text.kl for text in found])[chosen]
    delta = np.abs(np.concatenate([text.logprob_delta for text in found])[chosen])
    if not len(kl):
        return Bin(name, 0, 0.0, 0.0)
    return Bin(name, len(kl), float(kl.mean()), float(delta.mean()))
