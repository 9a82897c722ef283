"""How errors of a language model grow over tokens: over given ones, over its own, and from one changed token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from examples.diffusion_error_growth.settings import EXACT, Setting
from headrace.align.alignment import token_windows
from headrace.align.continuation import agreed_tokens, agreement, continuations
from headrace.align.divergence import Float64, divergence_of, log_softmax
from headrace.align.forced import forced_logits, forced_values
from headrace.align.subjects import Opened, open_subject
from headrace.executors.native import NativeExecutor
from headrace.formats.weights import Weights, matrices_in

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """Prompts, and what the exact model wrote after them: of its likeliest tokens, and at temperature 1."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    sampled: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Written in each."""
        return len(self.sampled[0])

    @property
    def whole(self) -> list[list[int]]:
        """Prompts and samples."""
        return [[*prompt, *ids] for prompt, ids in zip(self.prompts, self.sampled, strict=True)]


@dataclass(frozen=True, slots=True)
class Growth:
    """A rounded language model beside the exact one. One entry per token written, unless said otherwise.

    Attributes:
        kl, logprob_delta: means of KL(exact || rounded) and of |Δ log-probability| over the exact model's samples, fed
            to both.
        greedy_agreement, sampled_agreement: share of texts that are still the same if each model writes its own.
        best_agreement: what the share could be at most: if each model sampled its own with probabilities kept, but its
            draws tied to the other's as closely as can be (a maximal coupling: equal with probability 1 - half the sum
            of the differences). Beside it, `sampled_agreement` says what the sampler's rule makes of shared draws.
        kl_mean, kl_where_parted: mean KL of all positions of those samples; of those where the two models' own samples
            parted. One number each; the second is None if none did.
        lead_where_parted: by how much probability the exact model's likeliest token led the next where the greedy texts
            parted, on average; None if none did.
    """

    kl: list[float]
    logprob_delta: list[float]
    greedy_agreement: list[float]
    sampled_agreement: list[float]
    best_agreement: list[float]
    kl_mean: float
    kl_where_parted: float | None
    lead_where_parted: float | None


@dataclass(frozen=True, slots=True)
class OneToken:
    """The exact model after one token was changed: entries are 1, 2, … tokens later.

    Attributes:
        kl_same_words: mean KL of what follows, if the same tokens follow in both texts.
        kl_own_words: the same, if each text goes on as the model writes it, on the same random numbers.
        same_token: share of texts that have the same token there.
        kl_strangers: mean KL between two different texts of the set, at the same place: one number.
    """

    kl_same_words: list[float]
    kl_own_words: list[float]
    same_token: list[float]
    kl_strangers: float


def written(num_texts: int, prompt_length: int, num_tokens: int) -> Text:
    """By the exact model, after pieces of held-out documents."""
    opened = open_subject(EXACT)
    prompts = token_windows(opened.tokenizer, None, num_texts, prompt_length)
    greedy, sampled = (
        continuations(opened, prompts, num_tokens=num_tokens, temperature=temperature) for temperature in (0.0, 1.0)
    )
    return Text(prompts, greedy, sampled)


@dataclass(frozen=True, slots=True)
class Said:
    """What the exact model says along its texts: logits after every token of `Text.whole`, float32 ``[n, vocab]`` each,
    and how much more likely its likeliest token was than the next where it wrote the greedy ones, ``[texts, tokens]``.
    """

    logits: list[Float32]
    leads: Float64


def said_along(text: Text) -> Said:
    """By the exact model."""
    opened = open_subject(EXACT)
    greedy = logits_of(opened, [[*prompt, *ids] for prompt, ids in zip(text.prompts, text.greedy, strict=True)])
    before = slice(-text.num_tokens - 1, -1)  # the rows that give the tokens written
    likeliest = [np.sort(np.exp(log_softmax(logits[before])))[:, -2:] for logits in greedy]
    return Said(logits_of(opened, text.whole), np.stack([pair[:, 1] - pair[:, 0] for pair in likeliest]))


def growth(setting: Setting, text: Text, said: Said) -> Growth:
    """Of the language model in a setting."""
    opened, n = open_subject(setting.subject), text.num_tokens
    greedy, sampled = (
        continuations(opened, text.prompts, num_tokens=n, temperature=temperature) for temperature in (0.0, 1.0)
    )
    logits = logits_of(opened, text.whole)
    found = [divergence_of(a, b, ids) for a, b, ids in zip(said.logits, logits, text.whole, strict=True)]
    kl = np.stack([each.kl[-n:] for each in found])
    equal = 1 - np.stack([_variation(a[-n - 1 : -1], b[-n - 1 : -1]) for a, b in zip(said.logits, logits, strict=True)])
    return Growth(
        kl=kl.mean(0).tolist(),
        logprob_delta=np.abs([each.logprob_delta[-n:] for each in found]).mean(0).tolist(),
        greedy_agreement=agreement(text.greedy, greedy).tolist(),
        sampled_agreement=agreement(text.sampled, sampled).tolist(),
        best_agreement=equal.cumprod(1).mean(0).tolist(),
        kl_mean=float(kl.mean()),
        kl_where_parted=_mean_where_parted(kl, text.sampled, sampled),
        lead_where_parted=_mean_where_parted(said.leads, text.greedy, greedy),
    )


def after_one_token(text: Text, said: Said) -> OneToken:
    """The first token of each sample exchanged for the likeliest other one."""
    opened, num_tokens, start = open_subject(EXACT), text.num_tokens, len(text.prompts[0])
    others = []
    for logits, ids in zip(said.logits, text.sampled, strict=True):
        likeliest = np.argsort(-logits[start - 1])[:2].tolist()
        others.append(likeliest[0] if likeliest[0] != ids[0] else likeliest[1])
    left = [[*prompt, ids[0]] for prompt, ids in zip(text.prompts, text.sampled, strict=True)]
    right = [[*prompt, other] for prompt, other in zip(text.prompts, others, strict=True)]
    left_own, right_own = (
        continuations(opened, each, num_tokens=num_tokens - 1, temperature=1.0) for each in (left, right)
    )
    a, b, same = (
        logits_of(opened, [[*prompt, *ids] for prompt, ids in zip(prompts, written, strict=True)])
        for prompts, written in ((left, left_own), (right, right_own), (right, left_own))
    )
    rows = slice(start, start + num_tokens - 1)
    strangers = [_kl(a[i][rows], a[i - 1][rows]).mean() for i in range(len(a))]
    return OneToken(
        kl_same_words=np.mean([_kl(x[rows], y[rows]) for x, y in zip(a, same, strict=True)], 0).tolist(),
        kl_own_words=np.mean([_kl(x[rows], y[rows]) for x, y in zip(a, b, strict=True)], 0).tolist(),
        same_token=np.mean(np.array(left_own) == np.array(right_own), 0).tolist(),
        kl_strangers=float(np.mean(strangers)),
    )


def kl_by_window(format_name: str, text: Text, said: Said, windows: int) -> list[list[float]]:
    """Mean KL in each window of the text if the matrices are rounded in one: ``[rounded window][measured window]``.

    The exact and the rounded weights take turns on one executor, so later tokens read the keys and values that the
    rounded ones left.
    """
    exact, other = (_in_f32(open_subject(subject)) for subject in (EXACT, replace(EXACT, weights=format_name)))
    texts = text.whole
    length = len(texts[0]) // windows
    kl = np.zeros((windows, len(texts), windows))
    with exact.executor(length * windows) as executor:
        assert isinstance(executor, NativeExecutor)
        staged = executor.stage_weights(other.weights)
        for rounded_window in range(windows):
            for i, ids in enumerate(texts):
                values = forced_values(executor, ids[: length * windows], (exact.graph.output,), rows_per_step=length)
                for window in range(windows):
                    if window in (rounded_window, rounded_window + 1):  # there and back
                        executor.swap_weights(staged)
                    logits = next(values)[exact.graph.output]
                    rows = slice(window * length, (window + 1) * length)
                    kl[rounded_window, i, window] = _kl(said.logits[i][rows], logits).mean()
                if rounded_window == windows - 1:
                    executor.swap_weights(staged)
    return kl.mean(1).tolist()


def logits_of(opened: Opened, texts: Sequence[Sequence[int]]) -> list[Float32]:
    """After every token of some texts of one length, float32 ``[n, vocab]`` each."""
    length = len(texts[0])
    with opened.executor(length) as executor:
        return [forced_logits(executor, opened.graph.output, ids, rows_per_step=length) for ids in texts]


def kl_by_kind(format_name: str, text: Text, said: Said) -> dict[str, float]:
    """Mean KL over the texts if the matrices of attention alone, or of the MLPs alone, are in a format."""
    texts = text.whole
    found = {}
    for kind, only in (("attention", "*.attn.*"), ("MLP", "*.mlp.*")):
        rounded = logits_of(open_subject(replace(EXACT, weights=format_name, only=only)), texts)
        found[kind] = float(np.mean([_kl(a, b).mean() for a, b in zip(said.logits, rounded, strict=True)]))
    return found


def _in_f32(opened: Opened) -> Opened:
    """All matrices decoded, so that one subject's weights can take another's place."""
    weights: Weights = matrices_in("f32", opened.weights)
    return replace(opened, weights=weights)


def _kl(a: Float32, b: Float32) -> Float64:
    """KL(a || b) of each row: `divergence_of` wants a token that follows, and any will do here."""
    tail = np.zeros((1, a.shape[1]), np.float32)
    return divergence_of(np.vstack([a, tail]), np.vstack([b, tail]), [0] * (len(a) + 1)).kl


def _variation(a: Float32, b: Float32) -> Float64:
    """Half the sum of the differences of two rows' probabilities: the least chance that draws from them differ."""
    difference: Float64 = np.abs(np.exp(log_softmax(a)) - np.exp(log_softmax(b))).sum(-1) / 2
    return difference


def _mean_where_parted(values: Float64, a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float | None:
    """Of ``[texts, tokens]``, those at the first token in which two texts differ."""
    parted = [agreed_tokens(x, y) for x, y in zip(a, b, strict=True)]
    found = [values[i, at] for i, at in enumerate(parted) if at < values.shape[1]]
    return float(np.mean(found)) if found else None
