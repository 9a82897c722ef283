"""Text to calibrate on and text to judge by, from the Python that runs: no download, nothing in both parts."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal
from zlib import crc32

Part = Literal["calibration", "held_out"]

_MODULES = (
    "argparse", "ast", "asyncio.base_events", "bisect", "calendar", "collections", "configparser", "contextlib", "csv",
    "dataclasses", "decimal", "difflib", "doctest", "email.message", "enum", "fractions", "functools", "heapq",
    "html.parser", "http.client", "inspect", "ipaddress", "json.decoder", "logging", "mailbox", "optparse", "pathlib",
    "pickle", "platform", "pprint", "queue", "random", "sched", "shlex", "shutil", "socket", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "traceback", "typing", "unittest.case",
    "urllib.parse", "uuid", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip
_MIN_CHARACTERS = 2_000
_HELD_OUT_SHARE = 4  # one text in four


def texts(part: Part) -> tuple[str, ...]:
    """The part's documents: chapters of Python's language reference (prose), then modules of its library (code).

    Which part a document belongs to follows from its name alone, so none is in both, and each stays where it is when
    others come or go. What a document says follows from the Python release.
    """
    prose = [text for name, text in sorted(topics.items()) if _part_of(name) == part]
    code = [text for name in _MODULES if _part_of(name) == part and (text := _source_of(name))]
    return tuple(text for text in (*prose, *code) if len(text) >= _MIN_CHARACTERS)


def pieces(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Whole pieces of `length` token ids: the first of each document in turn, then the second of each, and so on."""
    return [
        list(ids[at : at + length])
        for at in range(0, max(map(len, documents)), length)
        for ids in documents
        if len(ids) >= at + length
    ]


def _part_of(name: str) -> Part:
    return "calibration" if crc32(name.encode()) % _HELD_OUT_SHARE else "held_out"


def _source_of(module: str) -> str:
    """The module's source; empty where this Python ships none of it."""
    found = importlib.util.find_spec(module)
    path = Path(found.origin) if found is not None and found.origin else None
    return path.read_text(encoding="utf-8") if path is not None and path.suffix == ".py" else ""
