"""The schema at /openapi.json, with the bodies that the endpoints read themselves."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headrace.serve.protocol import ChatRequest, CompletionRequest

_PATH = "#/components/schemas/"


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What an endpoint adds to its description to say that it takes a `kind`."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _PATH + kind.__name__}}},
        }
    }


def describe(app: FastAPI) -> None:
    """Make `app.openapi` include the schemas that `body_of` points to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
            _, bodies = models_json_schema(kinds, ref_template=_PATH + "{model}")  # type: ignore[arg-type]
            schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
