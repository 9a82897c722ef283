"""What a side answers to a suite of tasks: it chooses, of an item's continuations, the likeliest a byte."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np
import numpy.typing as npt

from headrace.align.branches import Branches, branch_logprobs
from headrace.align.divergence import TokenScores, token_scores
from headrace.align.huggingface import OpenTransformers
from headrace.align.server import OpenServer
from headrace.align.sides import OpenSide, Side
from headrace.align.subjects import Opened, Subject
from headrace.align.tasks import Item
from headrace.base.errors import InvalidRequestError
from headrace.text.tokenizer import Tokenizer

_ROWS_PER_STEP = 512

_Logprobs = tuple[npt.NDArray[np.floating], ...]
_Ask = Callable[[Sequence[Branches]], Iterator[_Logprobs]]


@dataclass(frozen=True, slots=True)
class Question:
    """An item in tokens.

    Attributes:
        branches: what all continuations begin with, and each continuation. A prompt's last token is part of these
            where one of them would be merged with it.
        num_bytes: of each continuation's text.
        answer: which of them is right.
    """

    branches: Branches
    num_bytes: tuple[int, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Score:
    """How a side did at a task: which items it got right."""

    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of the items."""
        return sum(self.right) / len(self.right)

    @property
    def error(self) -> float:
        """The accuracy's standard error, as if items were drawn at random: sqrt(p (1 - p) / n)."""
        return sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))

    def against(self, other: "Score") -> tuple[int, int]:
        """Items that this one got right and the other did not, and the reverse: what differs between two sides that
        answered the same questions, without the noise of which questions they were (McNemar 1947)."""
        assert len(self.right) == len(other.right), "two scores of one task"
        pairs = list(zip(self.right, other.right, strict=True))
        return pairs.count((True, False)), pairs.count((False, True))

    def minus(self, other: "Score") -> tuple[float, float]:
        """This accuracy less the other, and the difference's standard error over pairs of answers: of n of which
        `more` and `fewer` are those of `against`, sqrt((more + fewer) / n - difference²) / sqrt(n)."""
        more, fewer = self.against(other)
        n = len(self.right)
        difference = (more - fewer) / n
        return difference, sqrt(((more + fewer) / n - difference**2) / n)


@dataclass(frozen=True, slots=True)
class Answers:
    """Two sides' scores by task."""

    a: Mapping[str, Score]
    b: Mapping[str, Score]

    @property
    def lost(self) -> float:
        """A's accuracy over all tasks less B's."""
        return in_all(self.a).minus(in_all(self.b))[0]


def in_all(scores: Mapping[str, Score]) -> Score:
    """All tasks as one."""
    return Score(tuple(right for score in scores.values() for right in score.right))


def questions_of(tokenizer: Tokenizer, tasks: Mapping[str, Sequence[Item]]) -> dict[str, list[Question]]:
    """Tasks, as of `headrace.align.tasks.suite`, in tokens.

    Raises InvalidRequestError for a continuation that has no token of its own, or leaves none before it.
    """
    return {name: [_question(tokenizer, item) for item in items] for name, items in tasks.items()}


def check_scorable(side: Side) -> None:
    """Raises InvalidRequestError for a side whose log-probabilities are not those that its sampler reports."""
    if isinstance(side, Subject) and (side.temperature != 1 or side.logprobs != "exact"):
        raise InvalidRequestError(
            f"{side.title} cannot be scored: tasks take log-probabilities as a sampler reports them.",
            "Leave out temperature and logprobs, or --tasks.",
        )


def score(
    side: OpenSide,
    questions: Mapping[str, Sequence[Question]],
    *,
    progress: Callable[[str], None] = lambda name: None,  # noqa: ARG005
) -> dict[str, Score]:
    """Let a side answer.

    Args:
        side: one that `check_scorable` lets pass. A model that headrace runs computes a prompt once for all its
            continuations, and many items in a step; a server and transformers are asked for each text by itself.
        questions: by task, in the side's tokens.
        progress: told each task's name once it is done.

    Raises as the side does.
    """
    longest = max(question.branches.length for asked in questions.values() for question in asked)
    found = {}
    with _asking(side, longest) as ask:
        for name, asked in questions.items():
            said = ask([question.branches for question in asked])
            right = (_choice(q, logprobs) == q.answer for q, logprobs in zip(asked, said, strict=True))
            found[name] = Score(tuple(right))
            progress(name)
    return found


def _question(tokenizer: Tokenizer, item: Item) -> Question:
    prompt = tokenizer.encode(item.prompt)
    texts = [tokenizer.encode(item.prompt + choice) for choice in item.choices]
    begin = min(_in_common(prompt, text) for text in texts)
    for choice, text in zip(item.choices, texts, strict=True):
        if not 0 < begin < len(text):
            raise InvalidRequestError(
                f"{choice!r} adds no token of its own to {item.prompt!r}.", "Use a tokenizer that keeps words apart."
            )
    branches = Branches(tuple(prompt[:begin]), tuple(tuple(text[begin:]) for text in texts))
    return Question(branches, tuple(len(choice.encode()) for choice in item.choices), item.answer)


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _choice(question: Question, logprobs: _Logprobs) -> int:
    """The continuation of the highest log-probability a byte, the first of equals."""
    values = [float(each.sum(dtype=np.float64)) / n for each, n in zip(logprobs, question.num_bytes, strict=True)]
    return values.index(max(values))


@contextmanager
def _asking(side: OpenSide, longest: int) -> Iterator[_Ask]:
    if isinstance(side, Opened):
        rows = max(longest, _ROWS_PER_STEP)
        with side.executor(rows) as executor:
            yield partial(branch_logprobs, executor, rows_per_step=rows)
    else:
        yield partial(_text_by_text, side)


def _text_by_text(side: OpenServer | OpenTransformers, asked: Sequence[Branches]) -> Iterator[_Logprobs]:
    for each in asked:
        texts = [[*each.shared, *end] for end in each.ends]
        yield tuple(
            (found if isinstance(found, TokenScores) else token_scores(found, text)).logprobs[len(each.shared) - 1 :]
            for text, found in zip(texts, side.scores(texts), strict=True)
        )
