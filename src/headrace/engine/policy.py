"""Who goes first."""

from typing import Protocol

from headrace.engine.request import Sequence


class Policy(Protocol):
    """Orders sequences: for admission, and (backwards) for preemption."""

    def order(self, sequence: Sequence) -> tuple[float, ...]:
        """A key that is unique per sequence; lower goes first. Asked once, when the sequence enters the scheduler.

        For every sequence, only finitely many others may ever come before it: what comes first is what always
        advances, so a policy that lets newcomers pass without end starves the rest.
        """
        ...


class FirstCome:
    """In order of arrival, samples of one request in order of their index."""

    def order(self, sequence: Sequence) -> tuple[float, ...]:
        return (sequence.serial, sequence.index)
