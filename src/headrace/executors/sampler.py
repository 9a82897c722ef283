"""The reference of sampling: which token a row of logits becomes. Every executor's sampler is held to this one.

For one row, all arithmetic in float64 on the raw float32 logits x (no fused multiply-add):

1. Processing, in this order:
   ``x[t] += bias`` for each ``logit_bias``; ``x[t] = -inf`` for each banned id;
   for each distinct id in prompt or output: ``x[t] = x[t] / r if x[t] > 0 else x[t] * r``  (repetition penalty r);
   for each distinct id in the output: ``x[t] -= presence``, then ``x[t] -= frequency * count(t)``.
2. Temperature 0: the token is the id of the largest x, the lowest such id on a tie. Done.
3. ``x = (x - max x) / temperature``; candidates are the ids with ``x > -inf``, ordered by x descending, then id
   ascending; their weights are ``w = exp(x)``, so the first weight is 1.
4. Truncation, each rule over what the one before it left, each leaving a prefix of at least one candidate:
   top-k: the first k. top-p (only if below 1): the shortest prefix whose weights sum to at least ``top_p`` times the
   sum of all weights left. min-p: the candidates with ``w >= min_p``.
5. ``u = uniform(seed, index)``. The token is the first candidate, in order, at which the running sum of weights exceeds
   ``u`` times the sum of all weights left; the last candidate if rounding lets none.

The order in which a sum is taken, and the last bit of exp, are left to the implementation: two implementations pick
different tokens only where u falls within about 1e-13 of a boundary between two candidates. An implementation need
not sort further than the chosen candidate.

Logprobs come from the raw logits, before any processing: ``x[t] - (m + log(sum(exp(x - m))))`` with m the largest x, in
float64, rounded once to float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.base.errors import ExecutorError
from headrace.engine.step import Float32, Int32, SampleRow

Float64 = npt.NDArray[np.float64]

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


class Samples(NamedTuple):
    """The sampled part of a `headrace.engine.step.StepResult`, with its shapes and paddings.

    `top_ids` is padded with -1, `top_logprobs` with NaN.
    """

    token_ids: Int32
    logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1), a pure function of (seed, index): output `index` of a SplitMix64 stream.

    In unsigned 64-bit integers, wrapping, with G = 0x9E3779B97F4A7C15 and `mix64` below::

        state = mix64(seed + G)                  # seed as two's complement; one mix parts neighbouring seeds
        bits  = mix64(state + (index + 1) * G)
        u     = (bits >> 11) * 2^-53             # exact in float64

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = _mix64((seed + _GAMMA) & _MASK)
    bits = _mix64((state + (index + 1) * _GAMMA) & _MASK)
    return (bits >> 11) * 2.0**-53


def _mix64(z: int) -> int:
    """``z ^= z >> 30; z *= M1; z ^= z >> 27; z *= M2; z ^= z >> 31``: SplitMix64's finalizer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample(logits: Float32, rows: Sequence[SampleRow]) -> Samples:
    """Choose one token for each row of `logits`, float32 [R, V].

    Raises ExecutorError, naming the row, where no token can be chosen: NaN or +inf among the logits, or nothing but
    -inf left; and where a request names a token id outside the vocabulary.
    """
    assert logits.shape[0] == len(rows), f"{logits.shape} logits for {len(rows)} rows"
    num_top = max((row.params.logprobs or 0 for row in rows), default=0)
    made = Samples(
        token_ids=np.empty(len(rows), dtype=np.int32),
        logprobs=np.full(len(rows), np.nan, dtype=np.float32),
        top_ids=np.full((len(rows), num_top), -1, dtype=np.int32),
        top_logprobs=np.full((len(rows), num_top), np.nan, dtype=np.float32),
    )
    for r, row in enumerate(rows):
        raw = logits[r].astype(np.float64)
        _require_finite_maximum(raw, r)
        token = _choose(raw, row, r)
        made.token_ids[r] = token
        if row.params.logprobs is not None:
            logprobs = _log_softmax(raw)
            made.logprobs[r] = logprobs[token]
            best = _order(raw)[: row.params.logprobs]
            made.top_ids[r, : len(best)] = best
            made.top_logprobs[r, : len(best)] = logprobs[best]
    return made


def process(raw: Float64, row: SampleRow) -> Float64:
    """Step 1 above: a processed copy of one row of logits, float64 [V]."""
    x, params = raw.copy(), row.params
    for token, bias in params.logit_bias.items():
        x[token] += bias
    x[list(row.banned_ids)] = -np.inf
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array(row.prompt_ids + row.output_ids, dtype=np.int64))
        x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    produced, counts = np.unique(np.array(row.output_ids, dtype=np.int64), return_counts=True)
    x[produced] -= params.presence_penalty
    x[produced] -= params.frequency_penalty * counts
    return x


def _choose(raw: Float64, row: SampleRow, r: int) -> int:
    params = row.params
    for token in (*params.logit_bias, *row.banned_ids, *row.prompt_ids, *row.output_ids):
        if not 0 <= token < len(raw):
            raise ExecutorError(f"Sampled row {r} names token {token}, outside the vocabulary of {len(raw)}.")
    x = process(raw, row)
    _require_finite_maximum(x, r)
    if params.temperature == 0.0:
        return int(x.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature may send all but the largest to -inf
        x = (x - x.max()) / params.temperature
    ids = _order(x)
    weights = np.exp(x[ids])
    kept = _num_kept(weights, params.top_k, params.top_p, params.min_p)
    running = weights[:kept].cumsum()  # impossible tokens come last and add 0: the draw ends before them
    return int(ids[np.searchsorted(running, uniform(row.seed, row.index) * running[-1], side="right")])


def _num_kept(weights: Float64, top_k: int, top_p: float, min_p: float) -> int:
    """Step 4 above: how many leading candidates the truncations leave."""
    kept = min(top_k, len(weights)) if top_k > 0 else len(weights)
    if top_p < 1.0:
        running = weights[:kept].cumsum()
        kept = min(kept, int(np.searchsorted(running, top_p * running[-1], side="left")) + 1)
    return max(1, int((weights[:kept] >= min_p).sum()))


def _order(x: Float64) -> npt.NDArray[np.int64]:
    """Ids by value descending, then id ascending."""
    return np.argsort(-x, kind="stable")


def _log_softmax(raw: Float64) -> Float64:
    peak = float(raw.max())
    return raw - (peak + float(np.log(np.exp(raw - peak).sum())))


def _require_finite_maximum(x: Float64, r: int) -> None:
    # max() is NaN if any value is, so one test covers NaN, +inf and a row of nothing but -inf.
    if not np.isfinite(x.max()):
        raise ExecutorError(
            f"Sampled row {r} has no token to choose: its largest logit is {x.max()}.",
            "If the logits are not finite, check the weights; if every token is banned, ban fewer.",
        )
