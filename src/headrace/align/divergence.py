"""How far two distributions over the same tokens lie apart, position by position and in sum.

Everything is computed from float32 logits in float64: a softmax over 150,000 float32 terms would itself be off by more
than the differences that are looked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.engine.step import Float32
from headrace.numerics.rounding import round_to

Float64 = npt.NDArray[np.float64]

_ROWS = 32  # at a time: 50 MB of float64 at 49,152 tokens a row


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What is known of a model that gives no logits, over n tokens of one text.

    Attributes:
        logprobs: float64 ``[n - 1]``, log-probability of each token after the first.
        top1: int64 ``[n - 1]``, the likeliest token in its place; -1 where that is not known.
    """

    logprobs: Float64
    top1: npt.NDArray[np.int64]


Scores = Float32 | TokenScores
"""What a side says of a text: logits, float32 ``[n, vocab]``, row i being what follows token i; or less."""


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """Another model beside a reference, over n tokens of one text: n - 1 positions that have a next token.

    Attributes:
        kl: float64 ``[n - 1]``, KL(reference || other) of the next token's distributions, nats; NaN if one is unknown.
        reference_logprob: float64 ``[n - 1]``, log-probability that the reference gives the token that follows.
        logprob_delta: float64 ``[n - 1]``, the other's log-probability of that token minus the reference's.
        top1_same: bool ``[n - 1]``, whether both have the same likeliest token (ties: the lower id); without the
            positions where one side does not say.
    """

    kl: Float64
    reference_logprob: Float64
    logprob_delta: Float64
    top1_same: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A summary over all positions of some texts. KL and log-probabilities in nats; NaN for what is not known.

    Attributes:
        num_positions: how many.
        kl_mean, kl_p99, kl_max: of KL(reference || other).
        top1_agreement: share of positions where both have the same likeliest token.
        logprob_delta_mean, …_p50, …_p99, …_max: of \\|Δ log-probability\\| of the token that follows.
        reference_perplexity, perplexity: exp of the mean negative log-probability, of the reference and of the other.
    """

    num_positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    logprob_delta_mean: float
    logprob_delta_p50: float
    logprob_delta_p99: float
    logprob_delta_max: float
    reference_perplexity: float
    perplexity: float


def log_softmax(logits: Float32) -> Float64:
    """Log-probabilities of rows of logits, float64 ``[rows, vocab]``. A row with a NaN becomes all NaN."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def divergence_of(reference: Float32, other: Float32, token_ids: Sequence[int]) -> TokenDivergence:
    """Compare two models' logits over the same tokens.

    Args:
        reference, other: float32 ``[n, vocab]``, row i being what follows token i (`headrace.align.forced`).
        token_ids: the n tokens, at least two.
    """
    assert len(token_ids) == len(reference) > 1, f"{len(token_ids)} tokens, {len(reference)} rows"
    return divergence_of_rows(reference[:-1], other[:-1], token_ids[1:])


def divergence_of_rows(reference: Float32, other: Float32, following: Sequence[int]) -> TokenDivergence:
    """The same of any m positions: float32 ``[m, vocab]`` each, and the m tokens that follow."""
    assert reference.shape == other.shape, f"{reference.shape} against {other.shape}"
    assert len(following) == len(reference) > 0, f"{len(following)} tokens, {len(reference)} rows"
    ids = np.asarray(following, np.int64)
    pieces = (slice(i, i + _ROWS) for i in range(0, len(ids), _ROWS))
    return joined([_compare(reference[piece], other[piece], ids[piece]) for piece in pieces])


def joined(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    """Positions that follow each other. At least one part."""
    return TokenDivergence(
        kl=np.concatenate([part.kl for part in parts]),
        reference_logprob=np.concatenate([part.reference_logprob for part in parts]),
        logprob_delta=np.concatenate([part.logprob_delta for part in parts]),
        top1_same=np.concatenate([part.top1_same for part in parts]),
    )


def divergence_between(reference: Scores, other: Scores, token_ids: Sequence[int]) -> TokenDivergence:
    """As `divergence_of`, of sides of which one or both give no logits: as much as they say."""
    if not isinstance(reference, TokenScores) and not isinstance(other, TokenScores):
        return divergence_of(reference, other, token_ids)
    a, b = (x if isinstance(x, TokenScores) else token_scores(x, token_ids) for x in (reference, other))
    known = (a.top1 >= 0) & (b.top1 >= 0)
    return TokenDivergence(
        kl=np.full(len(a.logprobs), np.nan),
        reference_logprob=a.logprobs,
        logprob_delta=b.logprobs - a.logprobs,
        top1_same=(a.top1 == b.top1)[known],
    )


def summarize(texts: Sequence[TokenDivergence]) -> Divergence:
    """All positions of all texts, each counting alike. At least one text."""
    kl = np.concatenate([text.kl for text in texts])
    reference = np.concatenate([text.reference_logprob for text in texts])
    delta = np.concatenate([text.logprob_delta for text in texts])
    same = np.concatenate([text.top1_same for text in texts])
    size = np.abs(delta)
    return Divergence(
        num_positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()) if len(same) else float("nan"),
        logprob_delta_mean=float(size.mean()),
        logprob_delta_p50=float(np.percentile(size, 50)),
        logprob_delta_p99=float(np.percentile(size, 99)),
        logprob_delta_max=float(size.max()),
        reference_perplexity=float(np.exp(-reference.mean())),
        perplexity=float(np.exp(-(reference + delta).mean())),
    )


def token_scores(logits: Float32, token_ids: Sequence[int]) -> TokenScores:
    """What a text's logits, float32 ``[n, vocab]``, say of its tokens. Ties among the likeliest go to the lower id."""
    following = np.asarray(token_ids[1:], np.int64)
    logprobs = [
        log_softmax(logits[i:end])[np.arange(end - i), following[i:end]]
        for i in range(0, len(following), _ROWS)
        for end in (min(i + _ROWS, len(following)),)
    ]
    return TokenScores(np.concatenate(logprobs), logits[:-1].argmax(axis=-1))


def bf16_scores(logits: Float32, token_ids: Sequence[int]) -> TokenScores:
    """What a trainer has that takes a log-softmax in bf16: logits, their differences, the sum and the result rounded.

    Between -16 and -8 such log-probabilities are 0.06 apart. Ties among the likeliest go to the lower id.
    """
    rows = _to_bf16(logits[:-1])
    shifted = _to_bf16(rows - rows.max(axis=-1, keepdims=True))
    sums = _to_bf16(np.exp(shifted).sum(axis=-1, keepdims=True))
    logprobs = _to_bf16(shifted - _to_bf16(np.log(sums)))
    following = np.asarray(token_ids[1:], np.int64)
    return TokenScores(logprobs[np.arange(len(rows)), following].astype(np.float64), logprobs.argmax(axis=-1))


def _to_bf16(values: Float32) -> Float32:
    return round_to("bf16", values)


def _compare(reference: Float32, other: Float32, following: npt.NDArray[np.int64]) -> TokenDivergence:
    p, q = log_softmax(reference), log_softmax(other)
    rows = np.arange(len(following))
    with np.errstate(invalid="ignore"):  # a token that both hold impossible adds nothing
        terms = np.where(p == -np.inf, 0.0, np.exp(p) * (p - q))
    return TokenDivergence(
        kl=np.maximum(terms.sum(axis=-1), 0.0),  # rounding can leave -1e-17
        reference_logprob=p[rows, following],
        logprob_delta=q[rows, following] - p[rows, following],
        top1_same=p.argmax(axis=-1) == q.argmax(axis=-1),
    )
