"""Incremental detokenization: final text, whole characters, equal to decoding at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.text.detokenizer import IncrementalDetokenizer
from headrace.text.tokenizer import Tokenizer
from tests.unit.text import vocabularies

TOKENIZERS = {
    "byte level": Tokenizer.from_gguf_metadata(vocabularies.byte_level()),
    "pieces": Tokenizer.from_gguf_metadata(vocabularies.pieces()),
    "pieces without prefix": Tokenizer.from_gguf_metadata(vocabularies.pieces(add_space_prefix=False)),
}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def stream(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.append, ids), detokenizer.flush()]


@each
@given(data=st.data())
def test_joined_increments_equal_decoding_at_once(tokenizer, data):
    """Over any ids at all: invalid bytes, special tokens, ids without a token."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(stream(IncrementalDetokenizer(tokenizer, (), skip), ids)) == tokenizer.decode(ids, skip)


@each
@given(text=st.text(max_size=20), more=st.text(max_size=20))
def test_after_a_prompt_the_increments_are_what_the_tokens_add(tokenizer, text, more):
    prompt, ids = tokenizer.encode(text), tokenizer.encode(more, add_special_tokens=False)
    added = "".join(stream(IncrementalDetokenizer(tokenizer, prompt), ids))
    assert tokenizer.decode(prompt) + added == tokenizer.decode(prompt + ids)


@each
@given(text=st.text(alphabet=st.characters(min_codepoint=0x80, codec="utf-8"), min_size=1, max_size=10))
def test_no_half_character_is_given_out(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(ids) == text:  # U+FFFD is in the output only if it is in the text
        assert all(set(piece) <= set(text) for piece in stream(IncrementalDetokenizer(tokenizer), ids))


def test_a_character_comes_with_its_last_byte():
    tokenizer = TOKENIZERS["byte level"]
    ids = [tokenizer.token_to_id(char) for char in "ðŁĺĢ"]  # the four bytes of 😀
    assert stream(IncrementalDetokenizer(tokenizer), ids) == ["", "", "", "😀", ""]
    assert stream(IncrementalDetokenizer(tokenizer), ids[:3]) == ["", "", "", "\ufffd"]


def test_a_character_that_the_prompt_began_is_finished():
    tokenizer = TOKENIZERS["byte level"]
    ids = [tokenizer.token_to_id(char) for char in "ðŁĺĢ"]
    assert stream(IncrementalDetokenizer(tokenizer, [5, *ids[:2]]), ids[2:]) == ["", "😀", ""]


def test_leading_space_is_the_prefix_only_where_the_text_begins():
    tokenizer = TOKENIZERS["pieces"]
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert stream(IncrementalDetokenizer(tokenizer), hi) == ["hi", ""]
    assert stream(IncrementalDetokenizer(tokenizer, [1]), hi) == ["hi", ""], "special tokens are no text"
    assert stream(IncrementalDetokenizer(tokenizer, [1, *hi]), hi) == [" hi", ""]


def test_special_tokens_can_be_kept():
    tokenizer = TOKENIZERS["byte level"]
    (end,) = tokenizer.encode("<|im_end|>")
    assert stream(IncrementalDetokenizer(tokenizer), [end]) == ["", ""]
    assert stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), [end]) == ["<|im_end|>", ""]
