"""`LLM` over a model that continues every prompt with the bytes that follow its last one."""

import signal
import threading

import pytest

from headrace.base.errors import ContextLengthError, ExecutorError, HeadraceError, InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.llm.llm import LLM
from headrace.llm.outputs import Delta


@pytest.fixture
def llm(steps):
    with LLM(max_num_seqs=4) as made:
        yield made


def assert_idle(llm):
    engine = llm._runtime.engine
    engine.check_integrity()
    assert not engine.has_work
    assert not llm._inboxes
    assert engine.snapshot().kv_blocks_in_use == 0


def tokens(count, **fields):
    return SamplingParams(max_tokens=count, **fields)


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [("a", ["bc"]), (["a", "k"], ["bc", "lm"]), ([97], ["bc"]), ([[97], [107], "x"], ["bc", "lm", "yz"]), ([], [])],
)
def test_every_shape_of_prompts(llm, prompts, expected):
    outputs = llm.generate(prompts, tokens(2))
    assert texts(outputs) == expected
    assert_idle(llm)


def test_a_long_batch_keeps_its_order_with_parameters_of_its_own(llm):
    prompts = [chr(97 + i) for i in range(20)]
    each = [tokens(20 - i) for i in range(20)]  # the first ends last
    outputs = llm.generate(prompts, each)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20 - i for i in range(20)]
    assert [output.outputs[0].text[0] for output in outputs] == [chr(98 + i) for i in range(20)]
    assert all(output.metrics.num_prompt_tokens == 1 for output in outputs)


def test_the_progress_bar_moves_whenever_a_request_ends(llm, capsys, monkeypatch):
    moved = []
    from tqdm import tqdm

    monkeypatch.setattr(tqdm, "update", lambda bar, n=1: moved.append(llm._runtime.engine.num_running))
    llm.generate(["a", "b", "c"], [tokens(9), tokens(5), tokens(1)], use_tqdm=True)
    assert moved == [2, 1, 0]
    assert "req" in capsys.readouterr().err
    llm.generate(["a"] * 20, tokens(1), use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        (["a", ""], None, InvalidRequestError),
        (["a", "x" * 200], None, ContextLengthError),
        (["a", "b"], [SamplingParams()], InvalidRequestError),
        ("a", {"temperature": 0}, InvalidRequestError),
        ("a", [{"temperature": 0}], InvalidRequestError),
        (7, None, InvalidRequestError),
        (None, None, InvalidRequestError),
        ([1.5], None, InvalidRequestError),
        (["a", "b\ud800"], None, InvalidRequestError),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(llm, steps, prompts, params, error):
    with pytest.raises(error):
        llm.generate(prompts, params)
    assert steps.count == 0
    assert_idle(llm)


def test_chat_is_one_conversation_or_several(llm):
    one = [{"role": "user", "content": "a"}]
    assert texts(llm.chat(one, tokens(1))) == ["b"]
    assert texts(llm.chat([one, [{"role": "user", "content": "x"}]], [tokens(1), tokens(2)])) == ["b", "yz"]


def test_interleaved_streams(llm):
    streams = {prompt: llm.stream(prompt, tokens(5)) for prompt in "afk"}
    found = dict.fromkeys(streams, "")
    for _ in range(5):
        for prompt, stream in streams.items():
            found[prompt] += next(stream).text
    assert found == {"a": "bcdef", "f": "ghijk", "k": "lmnop"}
    assert texts(llm.generate("x", tokens(2))) == ["yz"], "while streams are open"
    assert all(next(stream, None) is None for stream in streams.values())
    assert_idle(llm)


def test_closing_a_stream_cancels_its_request(llm):
    stream, other = llm.stream("a", tokens(50)), llm.stream("b", tokens(3))
    assert isinstance(next(stream), Delta)
    next(other)
    stream.close()
    assert llm._runtime.engine.num_running == 1
    assert "".join(delta.text for delta in other) == "de"
    assert_idle(llm)


def test_a_stream_closed_by_another_thread_or_inside_a_step_does_not_deadlock(llm, steps):
    """As the garbage collector may do it, anywhere."""
    streams = [llm.stream(prompt, tokens(50)) for prompt in "ab"]
    for stream in streams:
        next(stream)

    def close_both(step):
        steps.action = lambda step: None
        streams[0].close()
        thread = threading.Thread(target=streams[1].close)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        assert llm._runtime.engine.num_running == 3, "not in the middle of a step"

    steps.action = close_both
    assert texts(llm.generate("x", tokens(3))) == ["yz{"]
    assert_idle(llm)


def test_threads_share_the_engine(llm):
    found = {}

    def work(prompt):
        found[prompt] = texts(llm.generate([prompt] * 5, tokens(5)))

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {prompt: ["".join(chr(ord(prompt) + i) for i in range(1, 6))] * 5 for prompt in "abcdef"}
    assert_idle(llm)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_comes_between_steps_and_loses_nothing(llm, monkeypatch):
    step = llm._runtime.engine.step

    def interrupted_step():
        events = step()
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return events

    stream, other = llm.stream("a", tokens(50)), llm.stream("k", tokens(6))
    next(stream)
    text = next(other).text
    monkeypatch.setattr(llm._runtime.engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert text + "".join(delta.text for delta in other) == "lmnopq"
    assert_idle(llm)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_batch_cancels_all_of_it(llm, steps):
    steps.action = lambda step: signal.raise_signal(signal.SIGINT) if steps.count == 3 else None
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], tokens(50))
    assert_idle(llm)
    assert texts(llm.generate("a", tokens(3))) == ["bcd"]


def test_a_failed_step_fails_its_requests_and_no_other(llm, steps):
    def fail(step):
        raise RuntimeError("tile fault")

    stream = llm.stream("a", tokens(50))
    next(stream)
    steps.action = fail
    with pytest.raises(ExecutorError, match="tile fault"):
        llm.generate(["b", "c"])
    with pytest.raises(ExecutorError, match="tile fault"):
        next(stream)
    steps.action = lambda step: None
    assert_idle(llm)
    assert texts(llm.generate("a", tokens(3))) == ["bcd"]


def test_an_unforeseen_error_ends_everything_with_its_cause(llm, monkeypatch):
    stream = llm.stream("a", tokens(50))
    next(stream)
    monkeypatch.setattr(llm._runtime, "step", lambda: 1 / 0)
    for ask in (lambda: next(stream), lambda: llm.generate("b"), lambda: next(llm.stream("c"))):
        with pytest.raises(ExecutorError, match="ZeroDivisionError"):
            ask()


def test_after_close_nothing_runs(steps):
    with LLM() as llm:
        stream = llm.stream("a", tokens(50))
        next(stream)
    llm.close()
    for ask in (lambda: next(stream), lambda: llm.generate("b"), lambda: next(llm.stream("c"))):
        with pytest.raises(HeadraceError, match="closed") as caught:
            ask()
        assert caught.value.remedy
    assert steps.count == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 1},
        {"max_num_seqs": 0},
        {"block_size": True},
        {"executor": "cuda"},
        {"executor": "torch", "num_threads": 2},
        {"executor": "torch", "activation": "bf16"},
        {"max_num_seqs": 64, "max_num_batched_tokens": 32},
        {"max_sequences": 3},
    ],
)
def test_wrong_options_are_named_before_anything_is_loaded(options):
    with pytest.raises(InvalidRequestError) as caught:
        LLM("/nowhere", **options)
    assert any(name in caught.value.cause for name in options)
