"""The task suite: the same items each time, one right continuation each, and a score that counts what it says."""

import numpy as np
import pytest

from headrace.align import tasks
from headrace.align.corpus import texts
from headrace.align.forced import forced_logprobs
from headrace.align.tasks import ITEMS, Item, Score, in_all, max_length, score, suite
from headrace.base.errors import InvalidRequestError
from headrace.executors.torch_executor import TorchExecutor
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama


class Letters:
    """A token for each character."""

    def encode(self, text):
        return [ord(character) % VOCAB for character in text]


@pytest.fixture
def executor():
    return TorchExecutor(tiny_llama(), random_weights(tiny_llama()), num_blocks=4)


def test_the_suite_is_whole_and_the_same_each_time():
    made = suite()
    assert {name: len(items) for name, items in made.items()} == dict.fromkeys(made, ITEMS)
    assert len(made) == 7
    assert suite() == made
    assert suite(1) != made
    for items in made.values():
        assert len(set(items)) == len(items)
        for item in items:
            assert len(set(item.choices)) == len(item.choices) > 1
            assert 0 <= item.answer < len(item.choices)
        assert {item.answer for item in items} >= {0, 1}, "the right one is not always in one place"


def test_sentences_are_of_texts_that_calibration_never_sees():
    seen = " ".join(" ".join(text.split()) for text in texts("calibration"))
    for item in suite()["next word"]:
        assert item.prompt + item.choices[item.answer] not in seen


def test_a_choice_is_the_likeliest_a_byte(executor, monkeypatch):
    item = Item("ab", ("cd", "efgh", "i"), 1)
    sums = {2: -3.0, 4: -4.0, 1: -1.5}
    begins = []

    def given(executor, ids, *, begin):
        begins.append(begin)
        return np.array([sums[len(ids) - begin]])

    monkeypatch.setattr(tasks, "forced_logprobs", given)
    assert score(executor, Letters(), {"one": [item]})["one"].right == (True,)
    assert begins == [2, 2, 2]


def test_only_the_continuation_is_scored(executor):
    ids = Letters().encode("what was said")
    whole = forced_logprobs(executor, ids)
    np.testing.assert_allclose(forced_logprobs(executor, ids, begin=9, rows_per_step=4), whole[8:], atol=1e-5)
    with pytest.raises(InvalidRequestError, match="none from 13 on"):
        forced_logprobs(executor, ids, begin=13)
    with pytest.raises(InvalidRequestError, match="no token of its own"):
        score(executor, Letters(), {"one": [Item("ab", ("", "c"), 1)]})


def test_scores_and_what_differs_between_them():
    a, b = Score((True, True, False, True)), Score((True, False, True, False))
    assert a.accuracy == 0.75
    assert a.error == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
    assert a.against(b) == (2, 1)
    assert in_all({"x": a, "y": b}).right == a.right + b.right
    assert max_length(Letters(), {"x": [Item("ab", ("c", "defg"), 0)]}) == 6
