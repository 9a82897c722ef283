"""The schema at /openapi.json, with the bodies that the endpoints read themselves."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PATH = "#/components/schemas/"


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What an endpoint adds to its description to say that it takes a `kind`."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _PATH + kind.__name__}}},
        }
    }


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Make `app.openapi` include the schemas of the bodies that `body_of` points to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = [(kind, "validation") for kind in bodies]
            _, found = models_json_schema(kinds, ref_template=_PATH + "{model}")  # type: ignore[arg-type]
            schema.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
