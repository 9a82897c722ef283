import pytest

from headrace.base.errors import CapacityError, ContextLengthError, InvalidRequestError
from headrace.engine.admission import max_length
from headrace.engine.config import EngineConfig
from headrace.engine.request import Request
from headrace.engine.sampling import SamplingParams


def length(num_prompt, *, max_model_len=100, pool_tokens=1000, prompt_ids=None, **params):
    request = Request(request_id="r", prompt_ids=prompt_ids or (1,) * num_prompt, params=SamplingParams(**params))
    return max_length(request, vocab_size=50, max_model_len=max_model_len, pool_tokens=pool_tokens)


def test_length_is_the_least_of_request_window_and_pool():
    assert length(10, max_tokens=5) == 15
    assert length(10, max_tokens=500) == 100
    assert length(10, max_tokens=None) == 100
    assert length(10, max_tokens=None, pool_tokens=40) == 41, "the last token needs no KV"
    assert length(99, max_tokens=5) == 100


def test_a_prompt_that_leaves_no_room_in_the_window():
    with pytest.raises(ContextLengthError, match="100 tokens; the context window holds 100") as caught:
        length(100)
    assert "99 tokens or fewer" in caught.value.remedy


def test_a_request_that_the_whole_pool_cannot_carry():
    assert length(10, max_tokens=11, pool_tokens=20) == 21
    with pytest.raises(CapacityError, match="may grow to 22 tokens; the KV cache holds 20") as caught:
        length(10, max_tokens=12, pool_tokens=20)
    assert "at most 11 output tokens" in caught.value.remedy
    for max_tokens in (1, None):
        with pytest.raises(CapacityError, match="Shorten the prompt to 20 tokens"):
            length(21, max_tokens=max_tokens, pool_tokens=20)
    assert length(20, max_tokens=None, pool_tokens=20) == 21


def test_empty_prompts_and_foreign_tokens():
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        length(0)
    with pytest.raises(InvalidRequestError, match="The prompt holds token 50"):
        length(0, prompt_ids=(1, 50))
    with pytest.raises(InvalidRequestError, match="The prompt holds token -1"):
        length(0, prompt_ids=(-1, 1))
    with pytest.raises(InvalidRequestError, match="stop_token_ids holds token 60"):
        length(1, stop_token_ids=(60,))
    with pytest.raises(InvalidRequestError, match="logit_bias holds token 70"):
        length(1, logit_bias={70: 1.0})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 2.5}, "max_num_batched_tokens"),
        ({"max_prefill_chunk": 0}, "max_prefill_chunk"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "some running sequences could not advance"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
    with pytest.raises(InvalidRequestError, match=message):
        EngineConfig(**setting)
