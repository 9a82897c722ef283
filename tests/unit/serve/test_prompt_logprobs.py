"""``echo`` with ``logprobs``: what the model gives the tokens of a prompt."""

import httpx
import numpy as np
import pytest

from headrace.align.forced import forced_logprobs
from headrace.align.subjects import Subject, open_subject
from headrace.engine.sampling import SamplingParams
from headrace.llm.async_llm import AsyncLLM
from headrace.llm.llm import LLM
from tests.support.live_server import serving
from tests.support.tiny_model import TOKENS, write_model

PROMPTS = [np.random.default_rng(i).integers(0, 90, size).tolist() for i, size in enumerate((24, 1, 9))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ask(model):
    with (
        serving(lambda: AsyncLLM(model, served_model_name="tiny", max_model_len=64)) as live,
        httpx.Client(base_url=live.url) as client,
    ):
        yield lambda **fields: client.post("/v1/completions", json={"model": "tiny", "temperature": 0, **fields})


def expected(model, prompt):
    with open_subject(Subject(model=model)).executor(64) as executor:
        return forced_logprobs(executor, prompt).tolist()


def test_they_are_the_executors_to_the_bit(ask, model):
    reply = ask(prompt=PROMPTS, echo=True, logprobs=2, max_tokens=0).json()
    for prompt, choice in zip(PROMPTS, reply["choices"], strict=True):
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == (expected(model, prompt) if len(prompt) > 1 else [])
        assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt)
        assert all(2 <= len(top) <= 3 for top in found["top_logprobs"][1:])
        assert (choice["finish_reason"], "".join(found["tokens"])) == ("length", choice["text"])
    assert reply["usage"]["prompt_tokens"] == sum(map(len, PROMPTS))
    assert reply["usage"]["completion_tokens"] == 0


def test_the_output_follows_and_is_what_it_was(ask):
    prompt = PROMPTS[0]
    alone = ask(prompt=prompt, logprobs=1, max_tokens=5, ignore_eos=True).json()["choices"][0]
    both = ask(prompt=prompt, echo=True, logprobs=1, max_tokens=5, ignore_eos=True).json()["choices"][0]
    assert both["text"].endswith(alone["text"])
    assert both["logprobs"]["token_logprobs"][24:] == alone["logprobs"]["token_logprobs"]
    assert both["logprobs"]["tokens"][24:] == alone["logprobs"]["tokens"]
    assert both["logprobs"]["text_offset"][24] == sum(map(len, both["logprobs"]["tokens"][:24]))


def test_tokens_named_by_their_ids(ask):
    found = ask(prompt=PROMPTS[0], echo=True, logprobs=3, max_tokens=0, return_tokens_as_token_ids=True).json()
    found = found["choices"][0]["logprobs"]
    assert found["tokens"] == [f"token_id:{token}" for token in PROMPTS[0]]
    for token, top in zip(PROMPTS[0][1:], found["top_logprobs"][1:], strict=True):
        assert f"token_id:{token}" in top


def test_what_cannot_be_scored_is_an_error(ask):
    assert "streamed" in ask(prompt="ab", echo=True, logprobs=1, stream=True).json()["error"]["message"]
    assert ask(prompt=[999], echo=True, logprobs=1).status_code == 400
    assert ask(prompt="ab", max_tokens=0).status_code == 400


def test_forced_tokens_end_nothing_and_the_rest_is_as_after_a_prompt(model):
    end = len(TOKENS) - 1
    forced = (5, end, 9, 5)
    with LLM(model, max_model_len=64) as llm:
        whole = SamplingParams(forced_ids=forced, max_tokens=8, temperature=0, logprobs=0)
        (found,) = llm.generate([[1, 2]], whole)[0].outputs
        (rest,) = llm.generate([[1, 2, *forced]], SamplingParams(max_tokens=4, temperature=0, logprobs=0))[0].outputs
    assert found.token_ids == [*forced, *rest.token_ids]
    assert [entry.logprob for entry in found.logprobs[4:]] == [entry.logprob for entry in rest.logprobs]
