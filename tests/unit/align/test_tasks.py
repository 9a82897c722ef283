"""The task suite: the same items each time, one right continuation each, none of what calibration reads."""

from headrace.align.corpus import texts
from headrace.align.tasks import ITEMS, suite


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
