"""GET /: the chat page. Plain files, with a policy that lets nothing else into the page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/api.js": ("api.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
# They hold no secrets, and a browser opens them before it can send a key.
PATHS = tuple(_FILES)
_HEADERS = {
    # Whatever a model says, the browser runs no script but ours and asks no server but this one.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'",
            "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew, so that page and server are of one version
}  # fmt: skip


def add_page(app: FastAPI) -> None:
    """Serve the page and its files."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        router.add_api_route(path, _endpoint(name, media_type), response_class=FileResponse)
    app.include_router(router)


def _endpoint(name: str, media_type: str) -> Callable[[], Awaitable[FileResponse]]:
    async def file() -> FileResponse:
        return FileResponse(_FOLDER / name, media_type=media_type, headers=_HEADERS)

    return file
