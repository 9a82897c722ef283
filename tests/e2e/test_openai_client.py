"""The official `openai` client against the server: over a scripted model, and over the real one."""

import asyncio

import openai
import pytest

from tests.support.fake_llm import FakeLLM
from tests.support.live_server import serving


def real_llm():
    from headrace.llm.async_llm import AsyncLLM

    return AsyncLLM(max_model_len=1024, max_num_seqs=8)


@pytest.fixture(scope="module", params=[FakeLLM, real_llm], ids=["scripted", "real"])
def server(request):
    with serving(request.param, api_key="secret") as live:
        yield live


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    (card,) = client.models.list().data
    assert client.models.retrieve(card.id).id == card.id
    return card.id


MESSAGES = [{"role": "user", "content": "Name the capital of France in one word."}]


def test_chat(client, model):
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert reply.id.startswith("chatcmpl-")


def test_an_answer_can_be_sent_back(client, model):
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, temperature=0)
    history = [*MESSAGES, reply.choices[0].message.model_dump(), {"role": "user", "content": "And of Spain?"}]
    again = client.chat.completions.create(model=model, messages=history, max_tokens=4, temperature=0)
    assert again.usage.prompt_tokens > reply.usage.prompt_tokens


def test_stream_equals_whole_reply(client, model):
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
    options = {"include_usage": True}
    with client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_stream_helper_accumulates(client, model):
    with client.chat.completions.stream(model=model, messages=MESSAGES, max_tokens=12, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_chat_logprobs(client, model):
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content), "greedy takes the likeliest"
    joined = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    assert joined.startswith(reply.choices[0].message.content)


def test_samples_and_seed(client, model):
    def draw(seed):
        reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, n=3, seed=seed)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.message.content for choice in reply.choices]

    assert draw(7) == draw(7)


def test_completion(client, model):
    reply = client.completions.create(model=model, prompt="One, two, three,", max_tokens=6, temperature=0, logprobs=2)
    (choice,) = reply.choices
    assert choice.text
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == reply.usage.completion_tokens
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)
    echoed = client.completions.create(model=model, prompt="One, two, three,", max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == "One, two, three," + choice.text


def test_completions_of_several_prompts(client, model):
    alone = [
        client.completions.create(model=model, prompt=prompt, max_tokens=5, temperature=0).choices[0].text
        for prompt in ("Red and", "Blue and")
    ]
    together = client.completions.create(model=model, prompt=["Red and", "Blue and"], max_tokens=5, temperature=0)
    assert [choice.text for choice in together.choices] == alone
    streamed = ["", ""]
    for chunk in client.completions.create(
        model=model, prompt=["Red and", "Blue and"], max_tokens=5, temperature=0, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_stop_and_extensions(client, model):
    extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "min_tokens": 2}
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=6, extra_body=extra)
    assert reply.usage.completion_tokens >= 2
    text = client.completions.create(model=model, prompt="a b c d", max_tokens=8, temperature=0).choices[0].text
    mark = text.strip()[1]
    stopped = client.completions.create(model=model, prompt="a b c d", max_tokens=8, temperature=0, stop=mark)
    assert stopped.choices[0].text == text[: text.index(mark)]
    assert stopped.choices[0].finish_reason == "stop"


def test_errors_have_their_classes(server, client, model):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
    assert "temperature" in bad.value.message
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=model, messages=MESSAGES, extra_body={"foo": 1})
    assert (unknown.value.code, unknown.value.param) == ("unknown_field", "foo")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_async_client(server, model):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:

            async def read():
                text = ""
                async for chunk in await client.chat.completions.create(
                    model=model, messages=MESSAGES, max_tokens=8, temperature=0, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            texts = await asyncio.gather(*(read() for _ in range(4)))
            whole = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
            return texts, whole.choices[0].message.content

    texts, whole = asyncio.run(run())
    assert texts == [whole] * 4


def test_nothing_is_left_running(server, client, model):
    with client.chat.completions.create(model=model, messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    for _ in range(100):
        snapshot = server.llm.engine_snapshot()
        if not (snapshot.num_running or snapshot.num_waiting or snapshot.kv_blocks_in_use):
            return
        asyncio.run(asyncio.sleep(0.02))
    pytest.fail(f"still there: {snapshot}")


def test_mid_stream_failure_is_an_api_error():
    def failing():
        return FakeLLM(fail_after=3)

    with serving(failing) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="The step failed"):
            list(stream)


def test_logprobs_of_a_prompt(client, model):
    prompt = [72, 105, 33]
    reply = client.completions.create(model=model, prompt=prompt, max_tokens=0, temperature=0, echo=True, logprobs=2)
    (choice,) = reply.choices
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(prompt)
    assert found.token_logprobs[0] is None
    for name, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top[name] == logprob <= max(top.values())
    assert (choice.text, reply.usage.completion_tokens) == ("".join(found.tokens), 0)
