"""The conversation of ``headrace chat``, with a model that answers from a script."""

import pytest

from headrace.base.errors import ContextLengthError, ExecutorError
from headrace.cli.chat import COMMANDS, Conversation
from headrace.engine.metrics import RequestMetrics
from headrace.engine.sampling import SamplingParams
from headrace.llm.outputs import Delta

METRICS = RequestMetrics(
    ttft=0.05,
    tpot=0.01,
    queue_time=0.0,
    total_time=0.1,
    num_prompt_tokens=7,
    num_cached_tokens=3,
    num_output_tokens=2,
    num_preemptions=0,
)


class ScriptedLLM:
    """Answers "answer N" to the N-th question, one word per delta; or raises what `raising` says, at a word."""

    def __init__(self):
        self.asked = []
        self.params = None
        self.raising = {}  # word number: error
        self.num_closed = 0

    def render_chat(self, messages):
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return messages

    def stream(self, prompt, params):
        self.params = params
        number = len(self.asked)
        try:
            for word, text in enumerate(("answer", f" {number}")):
                if word in self.raising:
                    raise self.raising.pop(word)
                yield Delta(0, text, [word], metrics=METRICS if word else None)
        finally:
            self.num_closed += 1


@pytest.fixture
def llm():
    return ScriptedLLM()


def talk(llm, *lines, **fields):
    """A conversation of these lines; an exception among them is raised by the prompt."""
    conversation = Conversation(llm, SamplingParams(temperature=0.7), **fields)
    remaining = iter(lines)

    def read():
        line = next(remaining, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    conversation.loop(read)
    return conversation


def said(conversation):
    return [message["content"] for message in conversation.messages]


def test_questions_carry_what_was_said_before(llm, capsys):
    conversation = talk(llm, "one\n", "  ", "", "two", system="be kind")
    assert llm.asked[1] == [("system", "be kind"), ("user", "one"), ("assistant", "answer 1"), ("user", "two")]
    assert said(conversation) == ["one", "answer 1", "two", "answer 2"]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"


def test_every_command_is_in_the_help_and_known(llm, capsys):
    talk(llm, "/help")
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert command in shown
        talk(llm, command.split()[0])
        assert "no command" not in capsys.readouterr().out
    talk(llm, "/nonsense x")
    assert "no command /nonsense; /help" in capsys.readouterr().out
    assert llm.asked == []


def test_exit_leaves_at_once(llm):
    talk(llm, "/exit", "one")
    assert llm.asked == []


def test_reset_and_system_start_over(llm, capsys):
    conversation = talk(llm, "one", "/reset", "two", "/system be brief", "three", "/system", "four", "/history")
    assert llm.asked[1:] == [
        [("user", "two")],
        [("system", "be brief"), ("user", "three")],
        [("user", "four")],
    ]
    assert conversation.system is None
    assert capsys.readouterr().out.endswith("user: four\nassistant: answer 4\n")


def test_temperature(llm, capsys):
    conversation = talk(llm, "/temperature 0", "one")
    assert llm.params.temperature == 0.0
    for wrong in ("hot", "-1", "nan", ""):
        assert talk(llm, f"/temperature {wrong}").params.temperature == 0.7
        assert "not a temperature" in capsys.readouterr().out
    assert conversation.params.temperature == 0.0


def test_stats_are_one_line(llm, capsys):
    talk(llm, "/stats", "one", "/stats", "two")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["answer 1", "[7 tokens in (3 cached), 2 out, TTFT 50 ms, 100.0 tok/s]"]
    assert lines[3:] == ["(stats off)", "answer 2"]


def test_retry_replaces_the_last_answer(llm, capsys):
    conversation = talk(llm, "/retry", "one", "two", "/retry")
    assert "nothing to retry" in capsys.readouterr().out
    assert llm.asked[1] == llm.asked[2]
    assert said(conversation) == ["one", "answer 1", "two", "answer 3"]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(llm, capsys):
    llm.raising = {1: KeyboardInterrupt()}
    conversation = talk(llm, "one", "two")
    assert said(conversation) == ["one", "answer", "two", "answer 2"]
    assert llm.num_closed == 2
    assert capsys.readouterr().out == "answer (stopped)\nanswer 2\n"


def test_an_interrupt_while_printing_cancels_the_request(llm, monkeypatch):
    def interrupted(*_args, **_more):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    conversation = talk(llm, "one")
    assert said(conversation) == ["one", "answer"]
    assert llm.num_closed == 1


def test_an_answer_interrupted_before_it_began_leaves_no_trace(llm):
    llm.raising = {0: KeyboardInterrupt()}
    assert said(talk(llm, "one", "two")) == ["two", "answer 2"]


def test_an_interrupt_at_the_prompt_says_how_to_leave(llm, capsys):
    conversation = talk(llm, "one", KeyboardInterrupt(), "two")
    assert said(conversation) == ["one", "answer 1", "two", "answer 2"]
    assert "Ctrl-D" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["two", "/retry"])
@pytest.mark.parametrize("word", [0, 1])
def test_an_error_costs_its_line(llm, line, word, capsys):
    conversation = Conversation(llm, SamplingParams())
    conversation.say("one")
    llm.raising = {word: ExecutorError("The step failed.", "Try again.")}
    lines = iter([line, "/exit"])
    conversation.loop(lambda: next(lines))
    assert said(conversation) == ["one", "answer 1"]
    assert capsys.readouterr().out.endswith("error: The step failed.\ntry:   Try again.\n")
    conversation.say("two")
    assert llm.asked[-1] == [("user", "one"), ("assistant", "answer 1"), ("user", "two")]


def test_a_full_context_points_to_reset(llm, capsys):
    llm.raising = {0: ContextLengthError("The prompt has 9000 tokens.", "Serve with a larger max_model_len.")}
    talk(llm, "one")
    assert "/reset" in capsys.readouterr().out
