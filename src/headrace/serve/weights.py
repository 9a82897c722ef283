"""``/v1/weights``: which weights run, and others in their place while requests are served."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from headrace.base.errors import InvalidRequestError
from headrace.llm.refit import WeightUpdate
from headrace.serve.body import read_json
from headrace.serve.config import ServerConfig
from headrace.serve.model import AsyncModel
from headrace.serve.openapi import body_of
from headrace.serve.protocol import Strict

Running = Literal["continue", "recompute"]


class UpdateRequest(Strict):
    """``POST /v1/weights``. `path` lies below the folder that the server was told to take weights from."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    version: int | None = None
    running: Running = "continue"
    keep_previous: bool = False
    sha256: dict[str, str] | None = None


class RollbackRequest(Strict):
    """``POST /v1/weights/rollback``."""

    running: Running = "continue"


def weights_router(llm: AsyncModel, config: ServerConfig, key_check: Any) -> APIRouter:
    """Only for servers that were told where weights may come from."""
    folder = config.weight_updates
    assert folder is not None
    router = APIRouter(prefix="/v1/weights", dependencies=[Depends(key_check)])

    @router.get("")
    async def get_weights() -> JSONResponse:
        return JSONResponse({"object": "weights", "version": llm.weight_version})

    @router.post("", openapi_extra=body_of(UpdateRequest))
    async def update_weights(request: Request) -> JSONResponse:
        body, _ = await read_json(request, UpdateRequest, config.max_body_bytes)
        update = await llm.update_weights(
            _below(folder, body.path),
            version=body.version,
            running=body.running,
            keep_previous=body.keep_previous,
            sha256=body.sha256,
        )
        return _reply(update)

    @router.post("/rollback", openapi_extra=body_of(RollbackRequest))
    async def roll_back(request: Request) -> JSONResponse:
        body, _ = await read_json(request, RollbackRequest, config.max_body_bytes)
        return _reply(await llm.rollback_weights(running=body.running))

    return router


def _below(folder: Path, path: str) -> str:
    """The path within the folder, links followed. Raises InvalidRequestError if it leads elsewhere."""
    found = (folder / path).resolve() if "\0" not in path else None
    if found is None or not found.is_relative_to(folder.resolve()):
        raise InvalidRequestError(
            f"path {path[:80]!r} does not lie in the folder that weights are taken from.",
            "Give a path relative to the server's --weight-updates.",
        )
    return str(found)


def _reply(update: WeightUpdate) -> JSONResponse:
    return JSONResponse({"object": "weights", **asdict(update)})
