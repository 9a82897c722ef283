"""Stop strings, against a search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.text.stop import StopChecker

letters = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def naive(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The stop string that is complete first; of those complete at once, the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def must_hold(text: str, stop: list[str]) -> int:
    """Length of the longest end of the text that is a proper beginning of a stop string."""
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


@given(letters, stops, st.data())
def test_equals_a_search_of_the_whole_text_however_it_is_cut(text, stop, data):
    checker, emitted, fed = StopChecker(stop), "", 0
    while fed < len(text):
        size = data.draw(st.integers(0, 4))
        piece = text[fed : fed + size]
        fed += len(piece)
        new, matched = checker.feed(piece)
        emitted += new
        if matched is not None:
            assert (emitted, matched) == naive(text[:fed], stop)
            return
        assert len(emitted) == fed - must_hold(text[:fed], stop), "neither more nor less is held back than needed"
    assert (emitted + checker.flush(), None) == naive(text, stop)


@pytest.mark.parametrize(
    ("stop", "pieces", "emitted", "matched"),
    [
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo", "\n\n"),
        (["aab"], ["aa", "ab"], "a", "aab"),
        (["abcd", "bc"], ["abcd"], "a", "bc"),
        (["b", "ab"], ["xab"], "x", "ab"),
    ],
)
def test_examples(stop, pieces, emitted, matched):
    checker, text = StopChecker(stop), ""
    for piece in pieces:
        new, found = checker.feed(piece)
        text += new
    assert (text, found) == (emitted, matched)


def test_flush_gives_what_was_held_and_starts_over():
    checker = StopChecker(["END"])
    assert checker.feed("theEN") == ("the", None)
    assert checker.flush() == "EN"
    assert checker.flush() == ""
    assert checker.feed("D") == ("D", None)
