"""Time what a decoding step costs beside the plan: the engine's loop, sampling, and a server's event loop.

    python benchmarks/loop.py loop [MODEL] [--seqs 64] [--rounds 5]
    python benchmarks/loop.py server [MODEL] [--seqs 64] [--rounds 9]

``loop``: from the end of one replay of the plan to the start of the next lies all that Python does for a step: commit,
detokenization, results, scheduling, the step's arrays, sampling parameters. Shown per kind of sampling, with its share
of a step, and the share of a step's kernel time that choosing tokens takes.

``server``: a server process with one streaming client per sequence (this process, on raw sockets) against
`LLM.generate` here with the same requests, in turn, round by round. Decoding alone is compared (seconds per step while
all sequences decode), and the whole run. The client's own work counts against the server: machines are full in both.
"""

import argparse
import json
import os
import re
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace import LLM, SamplingParams

PROMPT = "In a village by the river there once lived a miller who "
OUTPUT = 33

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "stop strings": {"temperature": 0.0, "stop": ("\n\n\n\n", "###")},
}


class TimedPlan:
    """A plan that notes when its replays of `num_rows` rows begin and end."""

    def __init__(self, plan: Any, num_rows: int) -> None:
        self._plan = plan
        self._num_rows = num_rows
        self.times: list[tuple[float, float]] = []

    def replay(self, token_ids: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        self._plan.replay(token_ids, *arguments)
        if len(token_ids) == self._num_rows:
            self.times.append((start, time.perf_counter()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Of different first tokens, so that no prefix is shared."""
    return [llm.tokenizer.encode(f"{i}: {PROMPT}") for i in range(count)]


def params(**sampling: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": OUTPUT, "ignore_eos": True, "seed": 1, **sampling})


def sampling_seconds(llm: LLM) -> tuple[float, float]:
    """Seconds of all workers in choosing tokens, and in all of the plan."""
    profile = llm._executor.profile(start=True)
    return profile.get("sample", (0.0, 0))[0], sum(seconds for seconds, _ in profile.values())


def bench_loop(args: argparse.Namespace) -> None:
    with LLM(args.model, max_model_len=1024, max_num_seqs=args.seqs, enable_prefix_caching=False) as llm:
        executor = llm._executor
        compiled = executor._plans[()]
        print(f"{args.seqs} decoding sequences")
        print(f"{'sampling':<14} {'plan ms':>8} {'beside ms':>10} {'share':>6} {'choosing, share of plan':>24}")
        for name, sampling in SAMPLING.items():
            timed = TimedPlan(compiled.plan, args.seqs)
            executor._plans[()] = replace(compiled, plan=timed)
            beside, plan = [], []
            before = sampling_seconds(llm)
            for _ in range(args.rounds):
                timed.times.clear()
                llm.generate(prompts(llm, args.seqs), params(**sampling), use_tqdm=False)
                plan += [end - start for start, end in timed.times]
                pairs = zip(timed.times, timed.times[1:], strict=False)
                beside += [start - end for (_, end), (start, _) in pairs]
            after = sampling_seconds(llm)
            choosing = (after[0] - before[0]) / (after[1] - before[1])
            around, inside = statistics.median(beside), statistics.median(plan)
            share = around / (around + inside)
            print(f"{name:<14} {inside * 1e3:8.2f} {around * 1e3:10.3f} {share:6.1%} {choosing:24.2%}", flush=True)


@dataclass(slots=True)
class Stream:
    """One client: when its chunks came."""

    socket: socket.socket
    times: list[float] = field(default_factory=list)
    tail: bytes = b""
    ended: bool = False

    def take(self, data: bytes, now: float) -> None:
        """Chunks are counted by their first bytes, wherever the data is cut; nothing is parsed."""
        data = self.tail + data
        self.times += [now] * data.count(b"data: {")
        self.ended = self.ended or b"data: [DONE]" in data
        self.tail = data[-11:] if b"data: {" not in data[-11:] else b""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds per step while all sequences decode, seconds in all, CPU seconds of event loop and client."""

    step: float
    whole: float
    event_loop: float = 0.0
    client: float = 0.0


def request_bytes(model: str, prompt: list[int]) -> bytes:
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def served(address: tuple[str, int], pid: int, requests: list[bytes]) -> Round:
    """All requests at once, each on a connection of its own."""
    selector = selectors.DefaultSelector()
    loop_before, client_before = thread_seconds(pid), own_seconds()
    begun = time.perf_counter()
    streams = []
    for request in requests:
        stream = Stream(socket.create_connection(address))
        stream.socket.sendall(request)
        stream.socket.setblocking(False)
        selector.register(stream.socket, selectors.EVENT_READ, stream)
        streams.append(stream)
    while selector.get_map():
        for key, _ in selector.select(60):
            data = key.data.socket.recv(1 << 16)
            key.data.take(data, time.perf_counter())
            if not data:
                selector.unregister(key.data.socket)
                key.data.socket.close()
    whole = time.perf_counter() - begun
    assert all(stream.ended for stream in streams), "a stream broke off"
    last = max(streams, key=lambda stream: stream.times[0])
    until = min(stream.times[-2] for stream in streams)  # the last chunk has the finish reason
    steps = [moment for moment in last.times if moment <= until]
    step = (steps[-1] - steps[0]) / (len(steps) - 1)
    return Round(step, whole, thread_seconds(pid) - loop_before, own_seconds() - client_before)


def in_process(llm: LLM, batch: list[list[int]]) -> Round:
    begun = time.perf_counter()
    results = llm.generate(batch, params(temperature=0.0), use_tqdm=False)
    whole = time.perf_counter() - begun
    return Round(statistics.median(result.metrics.tpot for result in results), whole)


def thread_seconds(pid: int) -> float:
    """CPU seconds of a process's main thread, which runs the server's event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def start_server(args: argparse.Namespace) -> tuple["subprocess.Popen[str]", tuple[str, int]]:
    command = [sys.executable, "-m", "headrace.cli", "serve", *filter(None, [args.model]), "--port", "0"]
    command += ["--max-model-len", "1024", "--max-num-seqs", str(args.seqs), "--no-prefix-caching", "--no-access-log"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    assert server.stdout is not None
    for line in server.stdout:
        if ready := re.search(r"http://([\d.]+):(\d+)", line):
            return server, (ready[1], int(ready[2]))
    raise SystemExit("The server did not start.")


def bench_server(args: argparse.Namespace) -> None:
    server, address = start_server(args)
    try:
        with LLM(args.model, max_model_len=1024, max_num_seqs=args.seqs, enable_prefix_caching=False) as llm:
            batch = prompts(llm, args.seqs)
            requests = [request_bytes(llm.model_name, prompt) for prompt in batch]
            served(address, server.pid, requests), in_process(llm, batch)  # warm both up
            rounds = []
            for _ in range(args.rounds):
                rounds.append((in_process(llm, batch), served(address, server.pid, requests)))
                print(" / ".join(f"{each.step * 1e3:.2f} ms" for each in reversed(rounds[-1])), flush=True)
    finally:
        server.terminate()
        server.wait(30)
    report(rounds, args.seqs)


def report(rounds: list[tuple[Round, Round]], seqs: int) -> None:
    def median(of: Any) -> float:
        return statistics.median(of(ours, theirs) for ours, theirs in rounds)

    tokens = seqs * OUTPUT
    print(f"{seqs} streaming clients (a step served / in process above), medians of {len(rounds)} rounds")
    print(f"step, in process      {median(lambda own, _: own.step) * 1e3:8.2f} ms")
    print(f"step, served          {median(lambda _, far: far.step) * 1e3:8.2f} ms")
    print(f"served / in process   {median(lambda own, far: far.step / own.step):8.3f}   decoding")
    print(f"                      {median(lambda own, far: far.whole / own.whole):8.3f}   the whole run")
    print(f"event loop            {median(lambda _, far: far.event_loop) / tokens * 1e6:8.1f} us of CPU per token")
    print(f"client                {median(lambda _, far: far.client) / tokens * 1e6:8.1f} us of CPU per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("loop", "server"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seqs", type=int, default=64)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    args.rounds = args.rounds or {"loop": 3, "server": 9}[args.part]
    {"loop": bench_loop, "server": bench_server}[args.part](args)


if __name__ == "__main__":
    main()
