"""Templates, and the static files they name.

Autoescape is on for every template, and templates hold no scripts: what a study, a worker or a traceback says is
always text. Static files carry a digest of their content in their address, so that browsers may keep them for good.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from api.pages import words

HERE = Path(__file__).parent.parent
STATIC = HERE / "static"
POLL_S = 2


@cache
def static_url(name: str) -> str:
    """Address of a static file, with the digest of its content."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"


class Static(StaticFiles):
    """Static files: kept for a year under their digest, asked for again without it."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        named = scope["query_string"].startswith(b"v=")
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if named else "no-cache"
        return response


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (
        words.ago,
        words.budget_lines,
        words.by_layer,
        words.capitalize_first,
        words.chance,
        words.duration,
        words.exact,
        words.finished,
        words.number,
        words.objective,
        words.objective_name,
        words.percent,
        words.plural,
        words.points,
        words.size,
        words.spread,
    ):
        made.filters[filter_.__name__] = filter_
    made.globals.update(static=static_url, states=words.STATES, meanings=words.MEANINGS)
    return made


TEMPLATES = _environment()


def here(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def live(request: Request, every_s: float = POLL_S, *others: str) -> Markup:
    """Attributes that keep the element `live` fresh, and `others` with it: htmx asks for this page again, in one
    request, and morphs those parts of it in place."""
    return Markup(
        'hx-get="{}" hx-trigger="every {}s, refresh" hx-select="#live" hx-target="#live" hx-swap="morph:outerHTML" '
        'hx-select-oob="{}"'
    ).format(here(request), f"{every_s:g}", ",".join(f"#{other}:morph" for other in others))


def page(
    request: Request, template: str, *, status: int = 200, section: str = "studies", **context: Any
) -> HTMLResponse:
    """Render one page for whoever `request` belongs to."""
    principal = getattr(request.state, "principal", None)
    context = {
        "request": request,
        "principal": principal,
        "can_act": principal is not None and principal.role == "admin",
        "section": section,
        "base_url": str(request.base_url).rstrip("/"),
        **context,
    }
    return HTMLResponse(TEMPLATES.get_template(template).render(context), status)
