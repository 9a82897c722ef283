import pytest

from headrace.base.errors import ContextLengthError, ExecutorError, HeadraceError, InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.llm.collector import Collector
from tests.support.byte_text import EOS, NUM_BLOCKS, reciting_runtime


def run(runtime, params, prompt="ab"):
    """One request to its end: its `RequestOutput`, and the deltas it came in."""
    ids = runtime.check_prompt(prompt, params)
    runtime.submit("r", ids, params)
    collector, deltas = Collector("r", None, ids, params), []
    while runtime.has_work:
        for request_id, output in runtime.step():
            assert request_id == "r"
            if isinstance(output, HeadraceError):
                raise output
            deltas.append(output)
            collector.add(output)
        runtime.engine.check_integrity()
    assert not runtime.engine.has_work
    assert runtime.engine.snapshot().kv_blocks_in_use == 0
    return collector.result(), deltas


def test_end_of_sequence_is_a_token_but_no_text():
    result, deltas = run(reciting_runtime("hello"), SamplingParams(max_tokens=50))
    (output,) = result.outputs
    assert output.text == "hello"
    assert output.token_ids == [*b"hello", EOS]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert [d.metrics is not None for d in deltas] == [False] * 5 + [True]
    assert result.metrics.num_output_tokens == 6


def test_max_tokens():
    result, _ = run(reciting_runtime("hello"), SamplingParams(max_tokens=3))
    assert result.outputs[0].text == "hel"
    assert result.outputs[0].finish_reason == "length"


def test_ignore_eos_gives_exactly_max_tokens():
    result, _ = run(reciting_runtime("hi"), SamplingParams(max_tokens=9, ignore_eos=True))
    assert result.outputs[0].token_ids == [*b"hi", *[EOS] * 7]
    assert result.outputs[0].text == "hi"


def test_a_stop_string_over_token_boundaries_never_shows():
    result, deltas = run(reciting_runtime("one END two"), SamplingParams(max_tokens=50, stop=("END",)))
    (output,) = result.outputs
    assert output.text == "one "
    assert (output.finish_reason, output.stop_reason) == ("stop", "END")
    assert output.token_ids == list(b"one END")
    assert all("E" not in d.text for d in deltas)


def test_a_near_miss_of_a_stop_string_is_given_back():
    result, _ = run(reciting_runtime("one EN"), SamplingParams(max_tokens=50, stop=("END",)))
    assert result.outputs[0].text == "one EN"


def test_a_stop_string_completed_by_the_last_allowed_token():
    result, _ = run(reciting_runtime("abEND"), SamplingParams(max_tokens=5, stop=("END",)))
    assert (result.outputs[0].text, result.outputs[0].finish_reason) == ("ab", "stop")


def test_a_stop_token_is_no_text():
    result, _ = run(reciting_runtime("ab!cd"), SamplingParams(max_tokens=50, stop_token_ids=(ord("!"),)))
    assert (result.outputs[0].text, result.outputs[0].stop_reason) == ("ab", ord("!"))


def test_characters_come_whole():
    result, deltas = run(reciting_runtime("é😀"), SamplingParams(max_tokens=50))
    assert result.outputs[0].text == "é😀"
    assert [d.text for d in deltas if d.text] == ["é", "😀"]


def test_samples_of_one_request_end_one_by_one():
    result, deltas = run(reciting_runtime("hey"), SamplingParams(n=3, max_tokens=50, stop=("y",), temperature=0))
    assert [o.text for o in result.outputs] == ["he"] * 3
    assert sum(d.metrics is not None for d in deltas) == 1


def test_logprobs_belong_to_tokens():
    result, _ = run(reciting_runtime("hé"), SamplingParams(max_tokens=50, logprobs=2))
    logprobs = result.outputs[0].logprobs
    assert [entry.token_id for entry in logprobs] == result.outputs[0].token_ids
    assert all(len(entry.top) == 2 for entry in logprobs)


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", SamplingParams(), InvalidRequestError),
        ([], SamplingParams(), InvalidRequestError),
        ([1, 257], SamplingParams(), InvalidRequestError),
        ([1, -1], SamplingParams(), InvalidRequestError),
        ([1, "2"], SamplingParams(), InvalidRequestError),
        ("a", SamplingParams(logit_bias={257: 1.0}), InvalidRequestError),
        ("a", SamplingParams(stop_token_ids=(300,)), InvalidRequestError),
        ("a" * 128, SamplingParams(), ContextLengthError),
    ],
)
def test_prompts_that_cannot_run(prompt, params, error):
    with pytest.raises(error) as caught:
        reciting_runtime("x").check_prompt(prompt, params)
    assert caught.value.cause
    assert caught.value.remedy


def test_cancelling_frees_everything():
    runtime = reciting_runtime("hello")
    runtime.submit("r", [1, 2], SamplingParams(n=2, max_tokens=50))
    runtime.step()
    runtime.cancel("r")
    runtime.cancel("r")
    assert not runtime.has_work
    assert runtime.engine.snapshot().kv_blocks_in_use == 0


def test_a_failed_step_ends_its_requests_with_the_error():
    def fail(step):
        raise RuntimeError("tile fault")

    runtime = reciting_runtime("x", before_step=fail)
    with pytest.raises(ExecutorError, match="tile fault"):
        run(runtime, SamplingParams())
    assert runtime.engine.snapshot().kv_blocks_total == NUM_BLOCKS
