"""``headrace chat``: a conversation in the terminal."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from headrace.base.errors import HeadraceError
from headrace.cli.options import add_model_arguments, add_sampling_arguments, llm_arguments, sampling_arguments

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
    """Messages so far, and what the user's lines do to them."""

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
                continue
            if line == "/exit":
                return
            try:
                self.handle(line)
            except HeadraceError as error:
                print(f"error: {error.cause}\ntry:   {error.remedy}" if error.remedy else f"error: {error.cause}")

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
            print("\n".join(f"{m['role']}: {m['content']}" for m in self._context()) or "(empty)")
        elif name == "/stats":
            self.show_stats = not self.show_stats
            print(f"(stats {'on' if self.show_stats else 'off'})")
        else:
            print(f"no command {name}; /help lists them")

    def say(self, text: str) -> None:
        """Add a message and stream the answer to it. If that fails, the message is taken back."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def retry(self) -> None:
        """Answer the last user message again."""
        if len(self.messages) < 2:
            print("(nothing to retry)")
            return
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self.say(question)

    def _context(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _answer(self) -> str:
        prompt = self.llm.render_chat(self._context())
        parts: list[str] = []
        metrics = None
        stream: Iterator[Any] = self.llm.stream(prompt, self.params)
        try:
            for delta in stream:
                parts.append(delta.text)
                print(delta.text, end="", flush=True)
                metrics = delta.metrics or metrics
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]  # a generator: closing it cancels the request
            print(" (stopped)", end="")
        print()
        if self.show_stats and metrics is not None:
            speed = f", {1 / metrics.tpot:.0f} tok/s" if metrics.tpot else ""
            cached = f" ({metrics.num_cached_tokens} cached)" if metrics.num_cached_tokens else ""
            print(f"[{metrics.num_prompt_tokens} tokens in{cached}, {metrics.num_output_tokens} out,", end=" ")
            print(f"TTFT {metrics.ttft * 1e3:.0f} ms{speed}]")
        return "".join(parts)

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
        return lambda: _strip_newline(sys.stdin.readline())
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory

    commands = WordCompleter([command.split()[0] for command in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=commands, complete_while_typing=False
    )
    return lambda: session.prompt("> ")


def _strip_newline(line: str) -> str:
    if not line:
        raise EOFError
    return line
