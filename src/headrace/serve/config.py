"""How to serve."""

from dataclasses import dataclass
from pathlib import Path

from headrace.base.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the server itself may be told; the model and the engine have their own arguments.

    Attributes:
        host: address to bind. The default is reachable from this machine alone; ``0.0.0.0`` opens it to the network.
        port: port to bind; 0 lets the system pick one.
        api_key: bearer token that every ``/v1`` request must carry; None asks for none. ``/health``, ``/metrics``
            and ``/version`` stay open to probes.
        max_queue: sequences (prompts times n) that may wait for the engine; a request beyond it gets status 429.
        max_body_bytes: largest request body; a longer one gets status 413.
        cors_origins: web origins whose pages may call the API from a browser; ``*`` means any.
        access_log: write one line per request.
        weight_updates: folder below which ``/v1/weights`` takes new weights from; None: there is no such endpoint. With
            it, every choice of a reply tells which weights gave each of its tokens (``weight_versions``).
        grace_seconds: how long a shutdown lets running requests go on before it ends them with an error.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 1024
    max_body_bytes: int = 8 << 20
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    weight_updates: Path | None = None
    grace_seconds: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidRequestError(f"port must be between 0 and 65535, not {self.port}.")
        if self.max_queue < 1 or self.max_body_bytes < 1 or self.grace_seconds < 1:
            raise InvalidRequestError("max_queue, max_body_bytes and grace_seconds must be at least 1.")
        if self.weight_updates is not None and not self.weight_updates.is_dir():
            raise InvalidRequestError(
                f"weight_updates is {self.weight_updates}, which is no folder.", "Make it, or name another."
            )
        if self.api_key == "":
            raise InvalidRequestError("api_key is empty.", "Give a token, or leave it out to ask for none.")
