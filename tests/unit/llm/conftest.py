import signal
import threading
import time

import pytest

from tests.support.byte_text import counting_model


class Steps:
    """Called before each step of the model: counts them, slows them down, holds them up, or makes one fail."""

    def __init__(self):
        self.count = 0
        self.seconds = 0.0
        self.go = threading.Event()
        self.go.set()
        self.running = threading.Event()
        self.action = lambda step: None

    def __call__(self, step):
        self.count += 1
        time.sleep(self.seconds)
        self.running.set()
        assert self.go.wait(10), "the step was never let go"
        self.action(step)


@pytest.fixture
def steps(monkeypatch):
    """Makes `LLM` and `AsyncLLM` load a model that counts bytes upwards."""
    steps = Steps()
    monkeypatch.setattr("headrace.llm.served_model.load_model", lambda name, config: counting_model(steps))
    return steps


@pytest.fixture
def interruptible():
    """Python's own Ctrl-C, also where the tests run in the background: there a shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
