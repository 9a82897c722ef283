"""Files of text that a user brings, and what is wrong with them."""

import json

import pytest

from headrace.align.documents import read_tokens
from headrace.base.errors import InvalidRequestError, TemplateError
from headrace.compress.pipeline import open_source
from tests.support.tiny_model import write_model


@pytest.fixture
def text(tmp_path):
    return open_source(write_model(tmp_path / "model")).text


def lines(tmp_path, *records):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def test_plain_text_is_one_document(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text("abc\nxyz\n")
    assert read_tokens(path, text) == text.tokenizer.encode("abc\nxyz\n")


def test_json_lines_are_documents_and_conversations_are_written_as_the_template_does(tmp_path, text):
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "x"}]
    path = lines(tmp_path, {"text": "xyz", "id": 7}, "", {"messages": messages})
    rendered = text.template.render(messages, add_generation_prompt=False)
    expected = text.tokenizer.encode("xyz") + text.tokenizer.encode(rendered, add_special_tokens=False)
    assert read_tokens(path, text) == expected


@pytest.mark.parametrize(("record", "said"), [
    ("{", "Line 2 of .* is no JSON"),
    ({"prompt": "abc"}, "Line 2 of .* has neither text nor messages"),
    ({"text": 3}, "neither text nor messages"),
    ({"messages": []}, "neither text nor messages"),
    ({"messages": ["abc"]}, "neither text nor messages"),
    ([1], "neither text nor messages"),
])  # fmt: skip
def test_a_line_that_is_no_document_is_named(tmp_path, text, record, said):
    with pytest.raises(InvalidRequestError, match=said):
        read_tokens(lines(tmp_path, {"text": "abc"}, record), text)


def test_what_cannot_be_read(tmp_path, text):
    with pytest.raises(InvalidRequestError, match="Cannot read"):
        read_tokens(tmp_path / "none.txt", text)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xe9\xff")
    with pytest.raises(InvalidRequestError, match="Cannot read"):
        read_tokens(path, text)


def test_conversations_for_a_template_that_is_broken(tmp_path):
    text = open_source(write_model(tmp_path / "model", tokenizer__chat_template="{% for %}")).text
    with pytest.raises(TemplateError):
        read_tokens(lines(tmp_path, {"messages": [{"role": "user", "content": "abc"}]}), text)
