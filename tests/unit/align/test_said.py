"""What a model says itself, and how text of several kinds is shared out."""

import numpy as np
import pytest

from headrace.align.samples import KINDS, chat_opening, check_kinds, default_kinds, said, shares
from headrace.base.errors import HeadraceError, InvalidRequestError, TemplateError
from headrace.compress.pipeline import open_source
from tests.support.tiny_model import write_model

TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}:{{ m.content }}{% endfor %}"


def text_of(path):
    return open_source(path).text


def test_own_samples_are_the_same_each_time_and_others_for_other_parts_and_seeds(tmp_path):
    model = write_model(tmp_path)
    found, again, other_seed, other_part = (
        said(model, {"own": 6}, 16, seed, part)["own"]
        for seed, part in ((3, "calibration"), (3, "calibration"), (4, "calibration"), (3, "held_out"))
    )
    assert found.shape == (6, 16)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, again)
    assert not np.array_equal(found, other_seed)
    assert not np.array_equal(found, other_part)


def test_conversations_begin_as_a_user_does(tmp_path):
    model = write_model(tmp_path, tokenizer__chat_template=TEMPLATE)
    opening = text_of(model).tokenizer.encode("<|end|>user:", add_special_tokens=False)
    chat = said(model, {"chat": 3, "corpus": 5}, 16, seed=3)["chat"]
    assert chat.shape == (3, 16)
    assert (chat[:, : len(opening)] == opening).all()
    assert len({tuple(ids) for ids in chat.tolist()}) == 3
    with pytest.raises(InvalidRequestError, match="texts have 6"):
        said(model, {"chat": 3}, 6, seed=3)


@pytest.mark.parametrize(("template", "error", "message"), [
    ("{{ messages[0].content }}", InvalidRequestError, "no beginning of a user's turn"),
    ("user: {{ messages[0].content | upper }}", InvalidRequestError, "no beginning of a user's turn"),
    ("{% for %}", TemplateError, "template"),
])  # fmt: skip
def test_a_template_that_begins_no_turn_of_a_user_is_refused_and_not_the_default(tmp_path, template, error, message):
    text = text_of(write_model(tmp_path, tokenizer__chat_template=template))
    with pytest.raises(error, match=message):
        chat_opening(text, 16)
    assert default_kinds(text, 64, 32, 16) == ("own", "corpus")
    assert default_kinds(text, 64, 1, 16) == ("corpus",)


def test_the_default_is_all_there_is(tmp_path):
    text = text_of(write_model(tmp_path, tokenizer__chat_template=TEMPLATE))
    assert default_kinds(text, 64, 32, 64) == KINDS
    assert default_kinds(text, 64, 32, 4) == ("own", "corpus"), "a turn does not fit"
    assert default_kinds(text, 64, 32, 65) == ("corpus",), "the model cannot say so much"


def test_kinds_that_are_none(tmp_path):
    (tmp_path / "mine.txt").touch()
    check_kinds(["chat", str(tmp_path / "mine.txt")])
    for kinds in ([], ["own", "own"], ["other"], [str(tmp_path)]):
        with pytest.raises(HeadraceError, match="no file that exists, or said twice"):
            check_kinds(kinds)


def test_shares():
    assert shares(("own", "chat", "corpus"), 8) == {"own": 3, "chat": 3, "corpus": 2}
    with pytest.raises(InvalidRequestError, match="cannot come from 3"):
        shares(("own", "chat", "corpus"), 2)
