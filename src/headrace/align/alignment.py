"""Two ways of running a model over the same tokens: how far apart, from which node on, and through what."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan

import numpy as np

from headrace.align.corpus import pieces, texts
from headrace.align.divergence import Divergence, Scores, TokenDivergence, divergence_between, summarize
from headrace.align.nodes import NodeError, node_errors
from headrace.align.scoring import Answers, Question, check_scorable, score
from headrace.align.server import OpenServer
from headrace.align.sides import OpenSide, Side, open_side
from headrace.align.subjects import SETTINGS, WITH_EXECUTOR, Subject
from headrace.base.errors import InvalidRequestError
from headrace.text.tokenizer import Tokenizer

CLIP = 0.2
"""How far from 1 an importance ratio may be before PPO clips it (arXiv:1707.06347)."""


@dataclass(frozen=True, slots=True)
class PolicyGap:
    """What a policy-gradient trainer would see if it trained with A on tokens that B rolled out: r = p_A / p_B.

    Attributes:
        k1, k3: means of -log r and of r - 1 - log r (Schulman, "Approximating KL Divergence", 2020). They estimate
            KL(B || A) where the tokens were sampled from B; on other text they are only means.
        ratio_p1, ratio_p50, ratio_p99: percentiles of r.
        clipped: share of tokens with r outside 1 ± 0.2.
        sequence_ratio_min, sequence_ratio_max: of the product of r over a text, to the power 1 / length.
    """

    k1: float
    k3: float
    ratio_p1: float
    ratio_p50: float
    ratio_p99: float
    clipped: float
    sequence_ratio_min: float
    sequence_ratio_max: float


@dataclass(frozen=True, slots=True)
class Cause:
    """One way in which B differs from A, taken back: what mean |Δ log-probability| is left, what share that explains.

    Shares need not add up to one: a torch executor has no activations to speak of, so taking `executor` back takes
    those of the native one back as well; and A's device and numerics come with A's executor.
    """

    name: str
    a: str
    b: str
    left: float
    explains: float


@dataclass(frozen=True, slots=True)
class Alignment:
    """A beside B. `nodes` are in the graph's order; there are none where A and B have no graph in common. `first` is
    the first that departs by itself, None if none does. `unknown` says in words what could not be compared, and why.
    `tasks` is what both answered, where they were asked.
    """

    a: str
    b: str
    divergence: Divergence
    policy: PolicyGap
    nodes: tuple[NodeError, ...]
    first: str | None
    causes: tuple[Cause, ...]
    unknown: tuple[str, ...] = ()
    tasks: Answers | None = None

    def exceeded(self, budget: dict[str, float]) -> list[str]:
        """What is beyond a budget, in words. A figure that is not a number is beyond any.

        Raises as `check_budget` does.
        """
        check_budget(budget)
        found = {name: BUDGETED[name](self) for name in budget}
        return [
            f"{name} is {'not known' if isnan(found[name]) else f'{found[name]:.4g}'}, not below {limit:g}"
            for name, limit in budget.items()
            if not found[name] < limit
        ]


BUDGETED: Mapping[str, Callable[[Alignment], float]] = {
    "kl": lambda found: found.divergence.kl_mean,
    "kl_p99": lambda found: found.divergence.kl_p99,
    "dlogprob": lambda found: found.divergence.logprob_delta_mean,
    "dlogprob_p99": lambda found: found.divergence.logprob_delta_p99,
    "dlogprob_max": lambda found: found.divergence.logprob_delta_max,
    "flips": lambda found: 1 - found.divergence.top1_agreement,
    "clipped": lambda found: found.policy.clipped,
    "tasks": lambda found: float("nan") if found.tasks is None else found.tasks.lost,
}
"""What a budget can limit."""


def check_budget(names: Iterable[str]) -> None:
    """Raises InvalidRequestError for a name that no budget can limit."""
    if unknown := set(names) - BUDGETED.keys():
        raise InvalidRequestError(f"A budget of {min(unknown)!r} is not known.", f"Use {', '.join(BUDGETED)}.")


def token_windows(tokenizer: Tokenizer, text: str | None, count: int, length: int) -> list[list[int]]:
    """Token ids to compare on: pieces of a text, or of held-out documents, one from each in turn."""
    documents = [text] if text is not None else texts("held_out")
    encoded = [tokenizer.encode(document) for document in documents]
    found = pieces(encoded, length)
    if not found and text is not None and len(encoded[0]) > 1:
        return encoded
    if len(found) < count and text is None:
        raise InvalidRequestError(f"There are {len(found)} pieces of {length} tokens, not {count}.", "Ask for fewer.")
    if not found:
        raise InvalidRequestError("The text has fewer than two tokens.", "Give a longer one.")
    return found[:count]


def align(
    a: Side,
    b: Side,
    tokens: Sequence[Sequence[int]],
    *,
    threshold: float,
    by_cause: bool,
    questions: Mapping[str, Sequence[Question]] | None = None,
    progress: Callable[[str], None] = lambda done: None,  # noqa: ARG005
) -> Alignment:
    """Compare two sides over the same texts.

    Args:
        tokens: texts as token ids, of one length.
        threshold: relative error of a node beyond which it departs by itself.
        by_cause: take back one difference after the other, and measure again.
        questions: tasks that both are to answer, in tokens.
        progress: told of each task that a side has answered.

    Raises InvalidRequestError if they do not share a vocabulary, for causes between sides that have no settings to
    take back, and for tasks put to a side that cannot be scored; and as the sides do.
    """
    if by_cause:
        _check_subjects(a, b)
    if questions is not None:
        check_scorable(a)
        check_scorable(b)
    opened_a, opened_b = open_side(a), open_side(b)
    _check_vocabularies(opened_a, opened_b)
    base = list(opened_a.scores(tokens))
    found = _compared(base, opened_b, tokens)
    nodes = _nodes(opened_a, opened_b, tokens[0])
    first = next((node.name for node in nodes if node.own > threshold), None)
    divergence = summarize(found)
    causes = tuple(find_causes(a, b, tokens, divergence, base=base)) if by_cause else ()
    tasks = None
    if questions is not None:
        scores_a, scores_b = (score(opened, questions, progress=progress) for opened in (opened_a, opened_b))
        tasks = Answers(scores_a, scores_b)
    unknown = tuple(
        f"{side.side.url} gives no whole distributions, so there is no KL, and no values of nodes"
        for side in (opened_a, opened_b)
        if isinstance(side, OpenServer)
    )
    return Alignment(a.title, b.title, divergence, _policy(found), nodes, first, causes, unknown, tasks)


def find_causes(
    a: Side,
    b: Side,
    tokens: Sequence[Sequence[int]],
    divergence: Divergence,
    *,
    base: Sequence[Scores] | None = None,
) -> list[Cause]:
    """Each difference between A and B taken back by itself, that is B with A's setting: most explained first.

    Args:
        tokens: the texts that `divergence` was found on.
        divergence: of A and B, as `align` gives it.
        base: what A says of the texts; None: to be computed.

    Raises InvalidRequestError for sides that have no settings to take back.
    """
    a, b = _check_subjects(a, b)
    base = list(open_side(a).scores(tokens)) if base is None else base
    whole = divergence.logprob_delta_mean
    causes = []
    for names in SETTINGS:
        taken, given = ({name: getattr(subject, name) for name in names} for subject in (a, b))
        if taken == given or (a.executor != b.executor and names[0] in WITH_EXECUTOR):
            continue
        along = WITH_EXECUTOR if names == ("executor",) else ()
        swapped = replace(b, **taken, **{name: getattr(a, name) for name in along})
        left = summarize(_compared(base, open_side(swapped), tokens)).logprob_delta_mean
        explains = 1 - left / whole if whole > 0 else 0.0
        said = [" of ".join(str(value) for value in values.values() if value != "*") for values in (taken, given)]
        causes.append(Cause(names[0], *said, left, explains))
    return sorted(causes, key=lambda cause: -cause.explains)


def compare_all(
    a: Subject, others: Sequence[Subject], tokens: Sequence[Sequence[int]], *, progress: Callable[[int], None]
) -> list[Divergence]:
    """Several subjects beside one, which runs once. `progress` is told how many are done."""
    base = list(open_side(a).scores(tokens))
    found = []
    for subject in others:
        found.append(summarize(_compared(base, open_side(subject), tokens)))
        progress(len(found))
    return found


def _compared(base: Sequence[Scores], other: OpenSide, tokens: Sequence[Sequence[int]]) -> list[TokenDivergence]:
    return [
        divergence_between(scores, others, ids)
        for scores, others, ids in zip(base, other.scores(tokens), tokens, strict=True)
    ]


def _nodes(a: OpenSide, b: OpenSide, token_ids: Sequence[int]) -> tuple[NodeError, ...]:
    """Node by node, where both sides have nodes and those have the same names."""
    if isinstance(a, OpenServer) or isinstance(b, OpenServer):
        return ()
    if [node.name for node in a.graph.nodes] != [node.name for node in b.graph.nodes]:
        return ()
    return tuple(node_errors(a, b, token_ids))


def _policy(found: Sequence[TokenDivergence]) -> PolicyGap:
    log_ratio = -np.concatenate([text.logprob_delta for text in found])  # log p_A - log p_B
    ratio = np.exp(log_ratio)
    by_text = [float(np.exp(-text.logprob_delta.mean())) for text in found]
    p1, p50, p99 = (float(value) for value in np.percentile(ratio, [1, 50, 99]))
    return PolicyGap(
        k1=float(-log_ratio.mean()),
        k3=float((ratio - 1 - log_ratio).mean()),
        ratio_p1=p1,
        ratio_p50=p50,
        ratio_p99=p99,
        clipped=float((np.abs(ratio - 1) > CLIP).mean()),
        sequence_ratio_min=min(by_text),
        sequence_ratio_max=max(by_text),
    )


def _check_subjects(a: Side, b: Side) -> tuple[Subject, Subject]:
    if isinstance(a, Subject) and isinstance(b, Subject):
        return a, b
    raise InvalidRequestError("Only headrace's own settings can be taken back.", "Leave --causes out.")


def _check_vocabularies(a: OpenSide, b: OpenSide) -> None:
    if isinstance(a, OpenServer) or isinstance(b, OpenServer):
        return  # a server says itself that it does not know a token
    sizes = [opened.graph.node(opened.graph.output).features for opened in (a, b)]
    if sizes[0] != sizes[1]:
        raise InvalidRequestError(
            f"The vocabularies have {sizes[0]} and {sizes[1]} tokens.", "Compare models of one tokenizer."
        )
