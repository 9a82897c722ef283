"""Free-running subjects: the same draws for all, and agreement that ends where the first token differs."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.align.continuation import agreed_tokens, agreement, continuations
from headrace.align.subjects import Subject, open_subject
from headrace.base.errors import InvalidRequestError
from tests.support.tiny_model import write_model

PROMPTS = [np.random.default_rng(i).integers(0, 90, 5).tolist() for i in range(6)]


@pytest.fixture
def exact(tmp_path):
    return Subject(model=write_model(tmp_path), activation="f32", kv="f32")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_executors_write_the_same_on_shared_draws(exact, temperature):
    a, b = (
        continuations(open_subject(subject), PROMPTS, num_tokens=12, temperature=temperature)
        for subject in (exact, Subject(model=exact.model, executor="torch", kv="f32"))
    )
    assert a == b
    assert [len(ids) for ids in a] == [12] * 6
    assert agreement(a, b).tolist() == [1.0] * 12


def test_a_prompt_writes_alike_whatever_runs_beside_it_and_draws_by_its_own_seed(exact):
    opened = open_subject(exact)
    together = continuations(opened, PROMPTS, num_tokens=8, temperature=1.0)
    alone = continuations(opened, PROMPTS[2:3], num_tokens=8, temperature=1.0, seed=2)
    assert alone == together[2:3]
    twins = continuations(opened, [PROMPTS[0]] * 4, num_tokens=8, temperature=1.0)
    assert len({tuple(ids) for ids in twins}) > 1, "one prompt, several draws"


def test_rounded_weights_part_sooner_the_fewer_bits_they_have(exact):
    base = continuations(open_subject(exact), PROMPTS * 4, num_tokens=16, temperature=1.0)
    lasted = [
        agreement(
            base,
            continuations(
                open_subject(replace(exact, weights=format_name)), PROMPTS * 4, num_tokens=16, temperature=1.0
            ),
        )
        for format_name in ("int8-channel", "int4-g32")
    ]
    assert lasted[0].mean() > lasted[1].mean()
    assert all((np.diff(shares) <= 0).all() for shares in lasted)


def test_agreement_counts_tokens_before_the_first_that_differs():
    assert [agreed_tokens([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [9, 2, 3])] == [3, 1, 0]
    assert agreement([[1, 2, 3]] * 2, [[1, 2, 3], [1, 9, 3]]).tolist() == [1.0, 0.5, 0.5]


def test_what_cannot_be_continued_is_refused(exact):
    opened = open_subject(exact)
    for prompts, said in (([], "no prompt"), ([[]], "prompt"), ([[100_000]], "vocabulary")):
        with pytest.raises(InvalidRequestError, match=said):
            continuations(opened, prompts, num_tokens=4, temperature=0.0)
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        continuations(opened, PROMPTS, num_tokens=0, temperature=0.0)
