import pytest

from headrace.base.errors import InvalidRequestError
from headrace.base.settings import Settings, from_environment


def test_nothing_set():
    assert from_environment({"PATH": "/bin", "HEADRACE_PEERS": "/x"}) == Settings()


def test_values_are_read():
    assert from_environment({"HEADRACE_ISA": "portable", "HEADRACE_THREADS": "3"}) == Settings(
        isa="portable", num_threads=3
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("HEADRACE_ISA", "sse9"), ("HEADRACE_THREADS", "0"), ("HEADRACE_THREADS", "two"), ("HEADRACE_THREADZ", "2")],
)
def test_what_cannot_be_read_is_named(name, value):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        from_environment({name: value})
    assert caught.value.remedy
    assert "(" not in caught.value.remedy  # words, not a tuple
