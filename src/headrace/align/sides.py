"""What can be compared: a model that headrace runs, one that transformers runs, one on a server."""

from headrace.align.huggingface import OpenTransformers, TransformersSide, open_transformers, transformers_named
from headrace.align.server import OpenServer, ServerSide, open_server, server_named
from headrace.align.subjects import Opened, Subject, open_subject, subject_named
from headrace.base.errors import InvalidRequestError
from headrace.llm.loader import open_model
from headrace.llm.text_side import load_text
from headrace.text.tokenizer import Tokenizer

Side = Subject | ServerSide | TransformersSide
OpenSide = Opened | OpenServer | OpenTransformers


def side_named(text: str) -> Side:
    """``http://…``, ``hf:…``, or what `subject_named` takes. Raises as those readers do."""
    if text.startswith(("http://", "https://")):
        return server_named(text)
    return transformers_named(text) if text.startswith("hf:") else subject_named(text)


def open_side(side: Side) -> OpenSide:
    """Find or reach what it runs. Raises as loading a model or asking a server does."""
    if isinstance(side, ServerSide):
        return open_server(side)
    return open_subject(side) if isinstance(side, Subject) else open_transformers(side)


def tokenizer_of(*sides: Side) -> Tokenizer:
    """The tokenizer of the first side that has one. Raises InvalidRequestError if all are servers."""
    for side in sides:
        if not isinstance(side, ServerSide):
            return load_text(open_model(side.model or None).checkpoint).tokenizer
    raise InvalidRequestError("Servers alone have no tokenizer to cut text with.", "Give a model as one side.")
