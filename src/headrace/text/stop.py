"""Stop strings in streamed text."""

from collections.abc import Sequence


class StopChecker:
    """Finds the first stop string in text that arrives in pieces, wherever the pieces are cut.

    The stop string that is *complete* first ends the text; of several completed by the same character, the longest.
    So the result depends on the text alone, and generation ends as early as it can.

    One Knuth-Morris-Pratt automaton per stop string: the cost is constant per character, and the longest state is
    exactly how much of the text must be held back.

    Args:
        stop: the stop strings; empty ones are not allowed.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "a stop string is not empty"
        self._stop = tuple(dict.fromkeys(stop))
        self._fallbacks = [_fallback_table(text) for text in self._stop]
        self._matched = [0] * len(self._stop)  # how much of each stop string the text so far ends with
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take an increment.

        Returns:
            The text that is now certain to lie before any stop string, and the stop string found, if one was.
            After a match nothing more may be fed.
        """
        if not self._stop:
            return text, None
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = self._advance(char)
            if found is not None:
                self._held = ""
                return buffer[: end - len(found)], found
        safe = len(buffer) - max(self._matched)
        self._held = buffer[safe:]
        return buffer[:safe], None

    def flush(self) -> str:
        """The text held back, at the end of the output."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stop)
        return held

    def _advance(self, char: str) -> str | None:
        found: str | None = None
        for index, stop in enumerate(self._stop):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = self._fallbacks[index][matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop) and (found is None or len(stop) > len(found)):
                found = stop
        return found


def _fallback_table(stop: str) -> list[int]:
    """Per position, the length of the longest proper prefix of ``stop`` that ends there too."""
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = table[matched - 1]
        if stop[matched] == stop[index]:
            matched += 1
        table[index] = matched
    return table
