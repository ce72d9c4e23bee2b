"""The web application: OpenAI's edit route and ours, health, metrics and the page. No Ray in here.

``create_app`` makes it; ``serve/command.py`` runs it in one process, ``serve/app.py`` in the replicas of a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import typing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from ip2p import __version__
from ip2p.models.coding import edit_sizes
from serve.access import BodyLimit, ErrorShape, Keys, RequestLog, error_response
from serve.api_errors import ApiError
from serve.edit_board import EditBoard
from serve.edit_jobs import EditJobs, job_routes
from serve.edits import EditRoute, edit_routes
from serve.engines import Engines
from serve.metrics import Metrics
from serve.settings import Settings

PAGE = Path(__file__).parent / "page"
CODES = {404: "not_found", 405: "method_not_allowed"}

log = logging.getLogger("ip2p.serve")


class Health:
    """WARMING until the default model answers, READY, DRAINING from the first wish to stop; FAILED says why."""

    def __init__(self, engines: Engines):
        self.engines, self.state, self.problem = engines, "WARMING", ""

    async def warm(self) -> None:
        """Load the model that is taken where a request names none."""
        try:
            await self.engines.get(self.engines.settings.default_model)
            self.state = "READY"
        except Exception as error:
            self.state, self.problem = "FAILED", "its model cannot be loaded; the log says why"
            log.error("the default model cannot be served: %s", error)


def create_app(settings: Settings, engines: Engines | None = None, board: EditBoard | None = None) -> FastAPI:
    """The application. ``engines`` and ``board``: those that it shares with others, else its own."""
    engines = engines or Engines(settings)
    health, metrics = Health(engines), Metrics(engines)
    jobs = EditJobs(board or EditBoard(settings.job_kept_s), settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(health.warm())
        yield
        health.state = "DRAINING"
        await warming
        await jobs.drain()
        await engines.close()

    app = FastAPI(
        title="ip2p", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        # The outermost first: an error of any layer below ErrorShape has the one shape.
        middleware=[
            Middleware(RequestLog, metrics=metrics),
            Middleware(ErrorShape),
            Middleware(Keys, digests=settings.key_digests),
            Middleware(BodyLimit, limit=settings.max_body_bytes, timeout_s=settings.body_timeout_s),
        ],
        exception_handlers={HTTPException: _http_error, RequestValidationError: _invalid, ApiError: _api_error},
    )  # fmt: skip
    app.include_router(_about(settings, engines, health, metrics))
    app.include_router(edit_routes(EditRoute(engines, settings, jobs, metrics)))
    app.include_router(job_routes(jobs))
    # What no route is for: a mount at "/" would also answer, with 404, for a route that is asked by another method.
    app.router.default = PageFiles(directory=PAGE, html=True)
    return app


class PageFiles(StaticFiles):
    """Asked for again each time (and answered by 304): after an upgrade no browser mixes old files with new ones."""

    def file_response(self, *args: typing.Any, **kwargs: typing.Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


def _about(settings: Settings, engines: Engines, health: Health, metrics: Metrics) -> APIRouter:
    """What a server says of itself."""
    routes = APIRouter()

    @routes.get("/healthz")
    async def healthz() -> JSONResponse:
        alive = engines.work()
        return JSONResponse({"status": "alive" if alive else "BROKEN"}, 200 if alive else 503)

    @routes.get("/readyz")
    async def readyz() -> JSONResponse:
        known = {"status": health.state, **({"problem": health.problem} if health.problem else {})}
        return JSONResponse(known, 200 if health.state == "READY" else 503)

    @routes.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(name, settings, engines) for name in settings.models]})

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> JSONResponse:
        if name not in settings.models:
            raise ApiError(404, "model_not_found", f"no model {name!r} here", "model")
        return JSONResponse(_model(name, settings, engines))

    return routes


def _model(name: str, settings: Settings, engines: Engines) -> dict[str, object]:
    """OpenAI's Model, with our limits and, once it is loaded, its own defaults."""
    limits = {
        "default_steps": settings.default_steps, "max_steps": settings.max_steps, "max_n": settings.max_n,
        "max_prompt_chars": settings.max_prompt_chars, "max_body_bytes": settings.max_body_bytes,
        "max_pixels": settings.max_pixels, "max_edit_pixels": settings.max_edit_pixels,
    }  # fmt: skip
    known: dict[str, object] = {"id": name, "object": "model", "created": 0, "owned_by": "ip2p", "limits": limits}
    for served in engines.loaded():
        if served.name == name:
            multiple, resolution = edit_sizes(served.model)
            known |= {
                "resolution": resolution, "size_multiple": multiple, "unet_sha256": served.model.sha256["unet"],
                "guidance_scale": served.model.guidance_scale,
                "image_guidance_scale": served.model.image_guidance_scale,
            }  # fmt: skip
    return known


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status == 500:
        log.error("%s failed", request.scope["state"]["request_id"], exc_info=error.__cause__ or error)
    return error_response(error, request.scope["state"]["request_id"])


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown path, a method, a body that is no form."""
    assert isinstance(error, HTTPException)
    code, headers = CODES.get(error.status_code, "invalid_request"), tuple((error.headers or {}).items())
    return await _api_error(request, ApiError(error.status_code, code, str(error.detail), None, headers))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await _api_error(request, ApiError(400, "invalid_value", first["msg"], str(first["loc"][-1])))
