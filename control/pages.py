"""/docs, /openapi.json, /asyncapi and /asyncapi.json without a request to anybody else's server."""

from __future__ import annotations

import asyncio
import html
import json
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.staticfiles import StaticFiles

from control.problems import MEDIA_TYPE
from warehouse.contracts import MetricsData

ASSETS = "/docs/assets"

# Swagger UI needs a line of script to start; a file of our own keeps inline scripts forbidden.
START = """window.ui = SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true,
  persistAuthorization: false, validatorUrl: null, presets: [SwaggerUIBundle.presets.apis]});
"""

DOCS = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>CloudOptim API</title>
<link rel="stylesheet" href="{ASSETS}/swagger-ui.css"><link rel="icon" href="data:,"></head>
<body><div id="swagger-ui"></div>
<script src="{ASSETS}/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></body></html>
"""

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem;border-top:1px solid #d0d7de;padding-top:1rem}
pre{background:#f6f8fa;border:1px solid #d0d7de;border-radius:6px;padding:.8rem;overflow:auto}
.tag{background:#ddf4ff;border-radius:1rem;padding:.1rem .6rem;font-size:.85rem}"""


def asyncapi_page(specification: dict[str, Any]) -> str:
    """A readable page of the event bus: every channel with its direction and the schema of its messages."""
    info = specification.get("info", {})
    channels = specification.get("channels", {})
    operations = specification.get("operations", {})
    schemas = specification.get("components", {}).get("schemas", {})
    messages = specification.get("components", {}).get("messages", {})
    sections = []
    for name, operation in sorted(operations.items()):
        channel_name = operation.get("channel", {}).get("$ref", "").rsplit("/", 1)[-1]
        channel = channels.get(channel_name, {})
        payloads: dict[str, Any] = {}
        for reference in operation.get("messages", []) or channel.get("messages", {}).values():
            message: dict[str, Any] = messages.get(reference.get("$ref", "").rsplit("/", 1)[-1]) or next(
                (messages[key] for key in messages if key.startswith(channel_name.split(":")[0])), {}
            )
            schema = message.get("payload", {}).get("$ref", "").rsplit("/", 1)[-1]
            if schema:
                payloads[schema] = schemas.get(schema, {})
        sections.append(
            f"<h2>{html.escape(channel.get('address') or channel_name or name)} "
            f'<span class="tag">{html.escape(operation.get("action", ""))}</span></h2>'
            f"<p>{html.escape(channel.get('description') or operation.get('description') or '')}</p>"
            + "".join(
                f"<h3>{html.escape(schema)}</h3><pre>{html.escape(json.dumps(body, indent=2))}</pre>"
                for schema, body in payloads.items()
            )
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(info.get("title", ""))}'
        f'</title><style>{STYLE}</style><link rel="icon" href="data:,"></head><body>'
        f"<h1>{html.escape(info.get('title', 'Events'))} {html.escape(str(info.get('version', '')))}</h1>"
        f"<p>{html.escape(info.get('description') or '')} Machine-readable: "
        f'<a href="/asyncapi.json">/asyncapi.json</a></p>{"".join(sections)}</body></html>'
    )


def complete_openapi(app: FastAPI) -> None:
    """Describe bodies that are decoded by hand, and how to authenticate."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            components = document.setdefault("components", {})
            _, contracts = models_json_schema(
                [(MetricsData, "validation")], ref_template="#/components/schemas/{model}"
            )
            components.setdefault("schemas", {}).update(contracts["$defs"])
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key or an access token."},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _describe_problems(operation)
                    if path.startswith("/api/") and "/auth/" not in path:
                        operation["security"] = [{"bearer": []}, {"apiKey": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_problems(operation: dict[str, Any]) -> None:
    """Every error is a problem+json, whatever FastAPI says of validation errors by itself."""
    for status, answer in operation["responses"].items():
        if status >= "400":
            answer["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def install(app: FastAPI, specification: dict[str, Any]) -> None:
    """Add the pages. ``specification`` is the AsyncAPI document."""
    complete_openapi(app)
    assets = files("fastapi_offline") / "static"
    app.mount(ASSETS, StaticFiles(directory=str(assets)), name="assets")
    page = asyncapi_page(specification)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> JSONResponse:
        # Making it takes a second of processor the first time: not on the loop that interruptions arrive on.
        return JSONResponse(await asyncio.to_thread(app.openapi))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS)

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript")

    @app.get("/asyncapi", include_in_schema=False)
    async def asyncapi() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/asyncapi.json", include_in_schema=False)
    async def asyncapi_json() -> JSONResponse:
        return JSONResponse(specification)
