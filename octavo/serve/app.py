"""The web application: routes, errors, and the door in front of them."""

from __future__ import annotations

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from octavo.serve import chat, completions, status, tokens
from octavo.serve.errors import add_handlers
from octavo.serve.guard import Guard
from octavo.serve.page import add_page
from octavo.serve.service import Service
from octavo.serve.settings import Settings
from octavo.version import __version__

# The guard checks the key; this only tells /docs that there is one.
_BEARER = Security(HTTPBearer(auto_error=False, description="--api-key, if the server has one"))


def create_app(settings: Settings) -> FastAPI:
    """The application. Its `state.service` answers 503 until it is opened with an engine."""
    app = FastAPI(
        title="octavo",
        version=__version__,
        description="Ministral behind the OpenAI API.",
        redoc_url=None,
    )
    service = Service(settings)
    app.state.service = service
    add_handlers(app)
    for module in (chat, completions, tokens):
        app.include_router(module.router, dependencies=[_BEARER])
    app.include_router(status.router)
    add_page(app)
    paths = frozenset(app.openapi()["paths"])
    app.openapi_schema = None  # it is cached, and routes may still be added
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, paths=paths)
    if settings.allowed_origins:
        # Outside the guard: a browser asks leave without a key, and must be able to read a 401.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app
