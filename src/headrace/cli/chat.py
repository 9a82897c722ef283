"""``headrace chat``: a conversation in the terminal."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from headrace.base.errors import ContextLengthError, HeadraceError
from headrace.cli.options import add_model_arguments, add_sampling_arguments, llm_arguments, sampling_arguments
from headrace.cli.stats import speed_line

if TYPE_CHECKING:
    from headrace import LLM, SamplingParams

HELP = "talk to a model in the terminal"

COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message (empty: the template's own) and start over",
    "/temperature X": "set the temperature (0 is greedy)",
    "/retry": "answer the last message again",
    "/history": "show the conversation so far",
    "/stats": "show or hide speed after each answer",
    "/exit": "leave (also Ctrl-D)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser, temperature=0.7, max_tokens=None)


def run(args: argparse.Namespace) -> int:
    from headrace import LLM, SamplingParams

    params = SamplingParams(**sampling_arguments(args))
    with LLM(**llm_arguments(args)) as llm:
        print(f"{llm.model_name}: /help for commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        Conversation(llm, params, system=args.system).loop(_reader())
    return 0


@dataclass
class Conversation:
    """Messages so far, and what the user's lines do to them.

    A question joins the messages together with its answer, so an error or an interrupt leaves nothing half said.
    """

    llm: "LLM"
    params: "SamplingParams"
    system: str | None = None
    show_stats: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def loop(self, read: Callable[[], str]) -> None:
        """Read lines until the end of input or ``/exit``. An error costs its line, never the conversation."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print("(Ctrl-D or /exit leaves)")
                continue
            if line == "/exit":
                return
            try:
                self.handle(line)
            except KeyboardInterrupt:
                print()
            except HeadraceError as error:
                remedy = "/reset starts over." if isinstance(error, ContextLengthError) else error.remedy
                print(f"error: {error.cause}\ntry:   {remedy}" if remedy else f"error: {error.cause}")

    def handle(self, line: str) -> None:
        """One line of input: a command or a message."""
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.say(line)
        elif name == "/help":
            print("\n".join(f"  {command:<16} {what}" for command, what in COMMANDS.items()))
        elif name == "/reset":
            self.messages.clear()
            print("(forgotten)")
        elif name == "/system":
            self.system = rest.strip() or None
            self.messages.clear()
            print("(system message set; new conversation)")
        elif name == "/temperature":
            self._set_temperature(rest)
        elif name == "/retry":
            self.retry()
        elif name == "/history":
            print("\n".join(f"{m['role']}: {m['content']}" for m in self._with_system(self.messages)) or "(empty)")
        elif name == "/stats":
            self.show_stats = not self.show_stats
            print(f"(stats {'on' if self.show_stats else 'off'})")
        else:
            print(f"no command {name}; /help lists them")

    def say(self, text: str) -> None:
        """Stream the answer to a message."""
        self._ask(self.messages, {"role": "user", "content": text})

    def retry(self) -> None:
        """Answer the last message again, in the place of its answer."""
        if not self.messages:
            print("(nothing to retry)")
            return
        *before, question, _ = self.messages
        self._ask(before, question)

    def _ask(self, before: list[dict[str, Any]], question: dict[str, Any]) -> None:
        answer = self._answer(self._with_system([*before, question]))
        if answer is not None:
            self.messages = [*before, question, {"role": "assistant", "content": answer}]

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _answer(self, messages: list[dict[str, Any]]) -> str | None:
        """Stream an answer to the screen; None if it was interrupted before it began."""
        prompt = self.llm.render_chat(messages)
        text = ""
        metrics = None
        try:
            with closing(self.llm.stream(prompt, self.params)) as deltas:  # closed early, it cancels the request
                for delta in deltas:
                    text += delta.text
                    print(delta.text, end="", flush=True)
                    metrics = delta.metrics or metrics
        except KeyboardInterrupt:
            print(" (stopped)")
            return text or None
        print()
        if self.show_stats and metrics is not None:
            print(f"[{speed_line(metrics)}]")
        return text

    def _set_temperature(self, text: str) -> None:
        try:
            self.params = replace(self.params, temperature=float(text))
        except ValueError:
            print(f"{text!r} is not a temperature; try /temperature 0.7")
            return
        print(f"(temperature {self.params.temperature:g})")


def _reader() -> Callable[[], str]:
    """Line editing with history on a terminal; plain lines from a pipe."""
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        return lambda: _unless_ended(sys.stdin.readline())
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory

    commands = WordCompleter([command.split()[0] for command in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=commands, complete_while_typing=False
    )
    return lambda: session.prompt("> ")


def _unless_ended(line: str) -> str:
    if not line:
        raise EOFError
    return line
