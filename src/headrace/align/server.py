"""A side that another server runs: what its OpenAI completions API says of given tokens.

The tokens go as ids, so that nothing is encoded again, and come back with their log-probabilities (``echo`` with
``logprobs``). vLLM, SGLang and `headrace serve` take this; a whole distribution none of them gives.
"""

import http.client
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

from headrace.align.divergence import Scores, TokenScores
from headrace.align.options import options_in
from headrace.base.errors import HeadraceError, InvalidRequestError, ModelNotFoundError

_NAMED_BY_ID = re.compile(r"token_id:(\d+)\Z")
_ASKS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0, "return_tokens_as_token_ids": True},
    {"max_tokens": 0},
    {"max_tokens": 1},
)
"""From what says most to what most servers take; a token that is produced is left out."""
_NOT_TAKEN = (400, 422)
_SHOWN = 300


class PeerError(HeadraceError):
    """Another server did not answer, or not with what was asked for."""

    code = "peer_failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSide:
    """A model on a server.

    Attributes:
        url: base of its API, ending with ``/v1`` on most.
        model: its name there; empty: the only one that is served.
        top: likeliest tokens to ask for beside each, 1 to 20.
        timeout: seconds to wait for one answer.
        key: API key; in no report.
    """

    url: str
    model: str = ""
    top: int = 5
    timeout: float = 120.0
    key: str = field(default="", repr=False)

    @property
    def title(self) -> str:
        """The line that names it, without its key."""
        return self.url + (f"?model={self.model}" if self.model else "")


def server_named(text: str) -> ServerSide:
    """``http://HOST:PORT/v1?model=NAME&key=value``. Raises InvalidRequestError for what is no such address."""
    base, _, options = text.partition("?")
    try:
        parts = urlsplit(base)
        wrong = not parts.hostname or parts.fragment or (parts.port is not None and parts.port < 1)
    except ValueError:
        wrong = True
    if wrong:
        raise InvalidRequestError(f"{base!r} is no server's address.", "Write http://127.0.0.1:8000/v1?model=NAME.")
    given = options_in(base, options, ("model", "top", "timeout", "key"))
    top, timeout = given.get("top", "5"), given.get("timeout", "120")
    if not (top.isdecimal() and 1 <= int(top) <= 20):
        raise InvalidRequestError(f"top={top!r} is not from 1 to 20.", "Servers give at most 20 alternatives.")
    if not re.fullmatch(r"\d+(\.\d+)?", timeout) or float(timeout) == 0:
        raise InvalidRequestError(f"timeout={timeout!r} is no number of seconds.", "Write timeout=120.")
    return ServerSide(
        url=base.rstrip("/"),
        model=given.get("model", ""),
        top=int(top),
        timeout=float(timeout),
        key=given.get("key", ""),
    )


@dataclass(frozen=True, slots=True)
class OpenServer:
    """A server that answered and has the model."""

    side: ServerSide
    model: str

    def scores(self, tokens: Sequence[Sequence[int]]) -> Iterator[Scores]:
        """What it gives each text's tokens. Raises PeerError."""
        asks = list(_ASKS)
        for ids in tokens:
            yield _token_scores(self.side.url, self._ask(ids, asks), ids)

    def _ask(self, ids: Sequence[int], asks: list[dict[str, Any]]) -> Mapping[str, Any]:
        """One text; ways of asking that the server does not take are dropped from `asks`."""
        fixed = {"model": self.model, "prompt": list(ids), "echo": True, "logprobs": self.side.top, "temperature": 0}
        while True:
            try:
                return _fetch(self.side, "/completions", {**fixed, **asks[0]})
            except _RefusedError as refused:
                if len(asks) == 1 or refused.status not in _NOT_TAKEN:
                    raise
                del asks[0]


def open_server(side: ServerSide) -> OpenServer:
    """Find its model. Raises PeerError, and ModelNotFoundError for a name that it does not serve."""
    reply = _fetch(side, "/models")
    try:
        names = [str(card["id"]) for card in reply["data"]]
    except (KeyError, TypeError):
        raise PeerError(f"{side.url}/models lists no models.", "Give the base of an OpenAI API.") from None
    if not side.model and len(names) == 1:
        return OpenServer(side, names[0])
    if side.model not in names:
        cause = f"{side.url} serves {', '.join(names) or 'nothing'}, not {side.model or 'one model alone'}."
        raise ModelNotFoundError(cause, f"Write {side.url}?model={names[0] if names else 'NAME'}.")
    return OpenServer(side, side.model)


class _RefusedError(PeerError):
    """It answered with an error status."""

    def __init__(self, status: int, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.status = status


def _fetch(side: ServerSide, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {side.key}"} if side.key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(side.url + path, data, headers), timeout=side.timeout) as answer:
            reply = json.loads(answer.read())
    except HTTPError as error:
        said = error.read().decode(errors="replace")[:_SHOWN]
        remedy = "Give key=…." if error.code in (401, 403) else "Its own words say why."
        raise _RefusedError(error.code, f"{side.url}{path} answered {error.code}: {said}", remedy) from None
    except TimeoutError:
        raise _too_slow(side, path) from None
    except (URLError, OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise _too_slow(side, path) from None
        raise PeerError(f"{side.url}{path} is not reached: {error}.", "See that the server runs, and where.") from None
    except ValueError:
        raise PeerError(f"{side.url}{path} did not answer with JSON.", "Give the base of an OpenAI API.") from None
    if not isinstance(reply, dict):
        raise PeerError(f"{side.url}{path} did not answer with an object.", "Give the base of an OpenAI API.")
    return reply


def _too_slow(side: ServerSide, path: str) -> PeerError:
    return PeerError(f"{side.url}{path} said nothing for {side.timeout:g} s.", "Give timeout=SECONDS, or fewer tokens.")


def _token_scores(url: str, reply: Mapping[str, Any], ids: Sequence[int]) -> TokenScores:
    try:
        logprobs = reply["choices"][0]["logprobs"]
        names, values = logprobs["tokens"][: len(ids)], logprobs["token_logprobs"][: len(ids)]
        tops = (logprobs.get("top_logprobs") or [None] * len(ids))[: len(ids)]
    except (KeyError, IndexError, TypeError):
        names, values, tops = [], [], []
    if not len(names) == len(values) == len(tops) == len(ids):
        raise PeerError(
            f"{url} gives log-probabilities of {len(values)} tokens of a prompt of {len(ids)}.",
            "It has to answer echo with logprobs, as vLLM, SGLang and headrace serve do.",
        )
    for i, (name, token) in enumerate(zip(names, ids, strict=True)):
        named = _NAMED_BY_ID.match(str(name))
        if named and int(named[1]) != token:
            raise PeerError(
                f"{url} says that token {i} is {named[1]}, but {token} was sent.", "Compare models of one tokenizer."
            )
    if not all(isinstance(value, int | float) for value in values[1:]):
        raise PeerError(f"{url} leaves out log-probabilities of the prompt's tokens.", "Ask its operator why.")
    return TokenScores(
        logprobs=np.array(values[1:], np.float64), top1=np.array([_likeliest(top) for top in tops[1:]], np.int64)
    )


def _likeliest(top: Mapping[str, float] | None) -> int:
    """The id of the likeliest token, ties to the lower; -1 where tokens are named by text, which is ambiguous."""
    found = [(-value, int(match[1])) for name, value in (top or {}).items() if (match := _NAMED_BY_ID.match(name))]
    return min(found)[1] if found else -1
