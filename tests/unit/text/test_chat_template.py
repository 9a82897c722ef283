"""Chat templates: what they refuse, what they bound, what they accept."""

import time

import pytest

from headrace.base.errors import InvalidRequestError, TemplateError
from headrace.text.chat_template import ChatTemplate, ConversationRefusedError
from headrace.text.tokenizer import Tokenizer
from tests.unit.text import vocabularies

ECHO = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
HI = [{"role": "user", "content": "hi"}]


def test_renders_messages_and_generation_prompt():
    template = ChatTemplate(ECHO)
    assert template.render(HI) == "user:hi\n>"
    assert template.render(HI, add_generation_prompt=False) == "user:hi\n"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ChatTemplate(ECHO).render([{"role": "user", "content": parts}]) == "user:one\ntwo\n>"


def test_special_tokens_and_variables_reach_the_template():
    template = ChatTemplate("{{ bos_token }}{{ mode }}{{ eos_token }}", {"bos_token": "<s>"})
    assert template.render(HI, mode="fast") == "<s>fast"


def test_named_templates_are_chosen_by_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools: {{ tools | length }}"})
    assert template.render(HI) == "plain"
    assert template.render(HI, tools=[{"type": "function"}]) == "tools: 1"
    with pytest.raises(TemplateError, match="no default chat template, only rag"):
        ChatTemplate({"rag": "x"}).render(HI)


def test_loop_properties_survive_the_bounded_loop():
    source = "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ '!' if loop.last else ',' }}{% endfor %}"
    assert ChatTemplate(source).render(HI * 3) == "0/3,1/3,2/3!"


def test_a_missing_template_says_what_to_do():
    with pytest.raises(TemplateError, match="no chat template") as caught:
        ChatTemplate(None).render(HI)
    assert "instruction-tuned" in caught.value.remedy


def test_a_syntax_error_names_its_line():
    with pytest.raises(TemplateError, match="line 2"):
        ChatTemplate("fine\n{% for %}")


def test_a_refusal_carries_the_templates_own_words():
    template = ChatTemplate("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ConversationRefusedError, match="System role not supported") as caught:
        template.render(HI)
    assert isinstance(caught.value, InvalidRequestError)
    assert isinstance(caught.value, TemplateError)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hello", "not a list of messages"),
        (["hello"], "Message 0 is a str"),
        ([{"content": "hi"}], "Message 0 has the role None"),
        ([*HI, {"role": "boss", "content": "hi"}], "Message 1 has the role 'boss'"),
        ([{"role": "user"}], "Message 0 has no content"),
        ([{"role": "user", "content": 3}], "not text"),
        ([{"role": "assistant", "content": None}], "no content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "type 'text'"),
        ([{"role": "user", "content": "hi", "extra": object()}], "other than JSON data in message 0"),
    ],
)
def test_malformed_conversations_are_named(messages, message):
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate(ECHO).render(messages)


def test_tool_calls_need_no_content():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    assert ChatTemplate("{{ messages[0].tool_calls | length }}").render([message]) == "1"


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('')[0].x.y }}",
    "mutation": "{{ messages.append(1) }}",
    "import": "{% include '/etc/passwd' %}",
    "huge range": "{% for i in range(10000000000) %}x{% endfor %}",
    "silent loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "exponential": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "product": "{{ 'x' * 99999999999 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling +": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling ~": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling filter": "{% set n = namespace(s='x') %}{% for i in [1]*99 %}{% set n.s = [n.s,n.s]|join %}{% endfor %}",
    "doubling set": "{% set n = namespace(s='x') %}{% for i in range(99) %}"
    "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "macro": "{% macro f() %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endmacro %}{{ f() }}",
    "text width": "{{ '{:{}}'.format(1, '99999999999') }}",
    "star width": "{{ '%*d' % (99999999999, 1) }}",
    "center": "{{ 'x' | center(99999999999) }}",
    "ljust": "{{ 'x'.ljust(99999999999) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "width": "{{ '{:99999999999}'.format(1) }}",
    "nested width": "{{ '{:{}}'.format(1, 99999999999) }}",
    "replace": "{% set s = 'x' * 999999 %}{{ s.replace('x', s) }}",
    "replace filter": "{% set s = 'x' * 999999 %}{{ s | replace('x', s) }}",
    "strftime": "{{ strftime_now('%99999999999d') }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_in_an_error_soon(source):
    start = time.monotonic()
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HI)
    assert time.monotonic() - start < 10, "MAX_SECONDS and slack for a busy machine"


def test_long_content_passes_the_bounds():
    source = "{{ (messages[0].content | replace('a', 'bb') | trim).replace('bb', 'c') }}"
    source += "{{ '%02d' % 7 ~ '**{{{}}}*'.format(1) }}"
    assert ChatTemplate(source).render([{"role": "user", "content": "a" * 1_000_000}]) == "c" * 1_000_000 + "07**{1}*"


def test_the_callers_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ChatTemplate("{% set _ = dict.update(messages[0], role='system') %}{{ messages[0].role }}").render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def test_gguf_metadata_gives_its_templates():
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level())
    metadata = {"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.chat_template.tool_use": "{{ eos_token }}"}
    template = ChatTemplate.from_gguf_metadata({**vocabularies.byte_level(), **metadata}, tokenizer)
    assert template.render(HI) == "<|im_start|>"
    assert template.render(HI, tools=[{}]) == "<|im_end|>"
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate.from_gguf_metadata({}, tokenizer).render(HI)


def test_a_template_that_is_not_text_is_an_error():
    with pytest.raises(TemplateError, match="not text"):
        ChatTemplate({"default": 3})


def test_a_folder_gives_its_template(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "chat_template": '
        '[{"name": "default", "template": "{{ bos_token }}d"}, {"name": "tool_use", "template": "t"}]}'
    )
    assert ChatTemplate.from_hf_folder(tmp_path).render(HI) == "<s>d"
    assert ChatTemplate.from_hf_folder(tmp_path).render(HI, tools=[{}]) == "t"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert ChatTemplate.from_hf_folder(tmp_path).render(HI) == "<s>file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match="cannot be read"):
        ChatTemplate.from_hf_folder(tmp_path)
