"""What quantization did to a model: both versions on text that calibration never saw, and whether that is bearable."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.align.divergence import Divergence, TokenDivergence, divergence_of, summarize
from headrace.align.forced import ROWS_PER_STEP, forced_logits
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step
from headrace.executors.native import NativeExecutor
from headrace.graph.ir import Graph
from headrace.graph.passes import fuse
from headrace.numerics.tensor import RawTensor

BLOCK_SIZE = 16
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
        by_rarity: by the probability that the source gives the token (`RARITIES`).
        by_position: by quarters of a text's length.
    """

    divergence: Divergence
    by_rarity: tuple[Bin, ...]
    by_position: tuple[Bin, ...]


class Evaluator:
    """Puts other weights beside a model's own, on the same texts.

    Both run each time: the model's logits, kept, would take 0.8 GB for 16 texts of 256 tokens and 49,152 logits each.

    Args:
        graph: the model.
        weights: the source's.
        texts: token ids, of one length.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, RawTensor], texts: Sequence[Sequence[int]]) -> None:
        assert len({len(text) for text in texts}) == 1, "texts of one length"
        self._graph = fuse(graph)
        self._texts = texts
        self._weights = weights

    def compare(
        self, weights: Mapping[str, RawTensor], *, num_texts: int | None = None, activation: str = "f32"
    ) -> Evaluation:
        """Teacher-force both on the texts, or the first few, text by text: logits of one are held at a time.

        Args:
            activation: of the other weights' linears; the source's read f32.
        """
        texts = self._texts[:num_texts]
        found = []
        length = len(texts[0])
        with (
            closing(_executor(self._graph, self._weights, length)) as source,
            closing(_executor(self._graph, weights, length, activation=activation)) as other,
        ):
            for text in texts:
                logits = [forced_logits(each, self._graph.output, text) for each in (source, other)]
                found.append(divergence_of(logits[0], logits[1], text))
        return Evaluation(summarize(found), _by_rarity(found), _by_position(found))


def decode_speed(
    graph: Graph, weights: Mapping[str, RawTensor], num_tokens: int = 64, *, activation: str = "auto"
) -> float:
    """Tokens per second of one sequence on the native executor: the median step, once warm. What the plan does,
    without an engine around it."""
    length = num_tokens + 8
    row = SampleRow(SamplingParams(temperature=0.0), 0, 0)
    with closing(_executor(fuse(graph), weights, length, activation=activation, kv_format="bf16")) as executor:
        seconds = []
        for position in range(length):
            step = Step(
                token_ids=np.zeros(1, np.int32),
                positions=np.array([position], np.int32),
                seq_starts=np.array([0, 1], np.int32),
                context_lens=np.array([position + 1], np.int32),
                block_tables=np.arange(position // BLOCK_SIZE + 1, dtype=np.int32)[None],
                sample_rows=np.zeros(1, np.int32),
                sampling=(row,),
            )
            start = time.perf_counter()
            executor.execute(step)
            seconds.append(time.perf_counter() - start)
    return 1 / float(np.median(seconds[8:]))


def _executor(
    graph: Graph, weights: Mapping[str, RawTensor], length: int, *, activation: str = "f32", kv_format: str = "f32"
) -> NativeExecutor:
    return NativeExecutor(
        graph,
        weights,
        num_blocks=-(-length // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        kv_format=kv_format,
        activation=activation,
        max_batched_tokens=ROWS_PER_STEP,
        max_num_seqs=ROWS_PER_STEP,
        max_model_len=length,
    )


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
