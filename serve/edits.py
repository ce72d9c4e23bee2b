"""``POST /v1/images/edits``, as OpenAI's client sends it: at once, as a stream with previews, or in the background."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
import typing
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from ip2p.editing.engine import Edit
from serve.api_errors import ApiError, api_error
from serve.edit_jobs import EditJobs
from serve.engines import Engines
from serve.form import READERS, EditForm, known_fields, read_form
from serve.metrics import Metrics
from serve.settings import Settings
from serve.taking_in import Taken, answer, details, encoded, finished, look, preview_file, provenance, take_in, usage
from serve.waiting import KEEP_ALIVE, KEEP_ALIVE_S, ClientGoneError, event_stream, server_event, unless_gone

MAX_PARTS = 64
MODEL_HEADER = "serve_multiplexed_model_id"  # Ray Serve's
MAX_TEXT_BYTES = 256 * 1024


class EditRoute:
    """The route and what it needs."""

    def __init__(self, engines: Engines, settings: Settings, jobs: EditJobs, metrics: Metrics):
        self.engines, self.settings, self.jobs, self.metrics = engines, settings, jobs, metrics

    async def __call__(self, request: Request) -> Response:
        """The answer in the form that was asked for. Raises ApiError."""
        form = read_form(await _parts(request), self.settings)
        form = _with_routed_model(form, request.headers.get(MODEL_HEADER), self.settings)
        request.scope["state"]["user"] = form.user or form.safety_identifier
        wishes = request.headers.get("prefer", "").lower()
        if "respond-async" in wishes:
            return await self._in_background(form)
        if form.stream:
            return await self._streamed(form, request.scope["state"]["request_id"])
        try:
            return await unless_gone(request, self._at_once(form, request.headers.get("accept", "")))
        except ClientGoneError:
            return Response(status_code=499)

    async def _at_once(self, form: EditForm, accepted: str) -> Response:
        taken = await take_in(form, self.engines, self.settings)
        pictures = await finished(taken, self.settings)
        self.metrics.count(taken.edits)
        if accepted.startswith("image/") and len(pictures) == 1:
            file = await asyncio.to_thread(encoded, taken, 0, pictures[0])
            seed = str(provenance(taken, 0)["seed"])
            return Response(file, media_type=f"image/{form.output_format}", headers={"x-ip2p-seed": seed})
        return JSONResponse(await answer(taken, pictures))

    async def _in_background(self, form: EditForm) -> Response:
        if form.stream:
            raise ApiError(400, "invalid_value", "stream or respond-async, not both; /events is a stream", "stream")
        record = await self.jobs.start(await take_in(form, self.engines, self.settings))
        headers = {"location": f"/v1/edits/{record['id']}", "preference-applied": "respond-async"}
        return JSONResponse(record, 202, headers=headers)

    async def _streamed(self, form: EditForm, request_id: str) -> Response:
        """Errors before the first event are answers like all others; later ones are events."""
        previews: asyncio.Queue[tuple[Edit, typing.Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        shown: list[typing.Any] = [None]

        def on_progress(edit: Edit) -> None:  # in the engine's thread
            if edit.preview is not shown[0]:
                shown[0] = edit.preview
                loop.call_soon_threadsafe(previews.put_nowait, (edit, edit.preview))

        taken = await take_in(form, self.engines, self.settings, on_progress)
        return event_stream(self._events(taken, previews, request_id))

    async def _events(
        self, taken: Taken, previews: asyncio.Queue[tuple[Edit, typing.Any]], request_id: str
    ) -> AsyncIterator[bytes]:
        work = asyncio.create_task(finished(taken, self.settings))
        try:
            number = 0
            async for edit, latent in _until_done(previews, work):
                if edit is None:
                    yield KEEP_ALIVE
                    continue
                try:
                    picture, file = await asyncio.to_thread(preview_file, taken, edit, latent, self.settings)
                except Exception as error:
                    yield server_event("error", api_error(error).body(request_id))
                    return
                partial = {"partial_image_index": number, **_event(taken, picture, file)}
                yield server_event("image_edit.partial_image", {"type": "image_edit.partial_image", **partial})
                number += 1
            yield await self._last_event(taken, work, request_id)
        finally:
            work.cancel()  # the client is gone, or there is nothing left to cancel

    async def _last_event(self, taken: Taken, work: asyncio.Task[typing.Any], request_id: str) -> bytes:
        try:
            picture = (await work)[0]
        except Exception as error:
            return server_event("error", api_error(error).body(request_id))
        self.metrics.count(taken.edits)
        file = await asyncio.to_thread(encoded, taken, 0, picture)
        completed = {"type": "image_edit.completed", **_event(taken, picture, file), "usage": usage(taken)}
        return server_event("image_edit.completed", {**completed, "ip2p": details(taken)})


def _with_routed_model(form: EditForm, routed: str | None, settings: Settings) -> EditForm:
    """The model of the header by which a cluster finds a replica that holds it; the form's word must be the same."""
    if routed is None:
        return form
    if form.model not in (None, routed):
        message = f"model is {form.model!r} and the header {MODEL_HEADER} {routed[:80]!r}; send the same"
        raise ApiError(400, "invalid_value", message, "model")
    return dataclasses.replace(form, model=READERS["model"]("model", routed, settings))


def _event(taken: Taken, picture: typing.Any, file: bytes) -> dict[str, typing.Any]:
    return {"b64_json": base64.b64encode(file).decode(), "created_at": int(time.time()), **look(taken, picture)}


async def _until_done(
    previews: asyncio.Queue[tuple[Edit, typing.Any]], work: asyncio.Task[typing.Any]
) -> AsyncIterator[tuple[Edit | None, typing.Any]]:
    """Previews as they come, until ``work`` is done and all are shown; an empty one where nothing has come for long."""
    while not (work.done() and previews.empty()):
        coming = asyncio.ensure_future(previews.get())
        try:
            await asyncio.wait({coming, work}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            coming.cancel()
            raise
        if coming.done():
            yield coming.result()
            continue
        coming.cancel()
        if not work.done():
            yield None, None


async def _parts(request: Request) -> list[tuple[str, str | bytes]]:
    """All parts of a multipart form, files as bytes."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    # Texts would be decoded by whatever codec of Python's the charset names.
    if kind.lower() != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise ApiError(415, "unsupported_media_type", "send a form: multipart/form-data, as curl -F does", None)
    async with request.form(max_files=16, max_fields=MAX_PARTS, max_part_size=MAX_TEXT_BYTES) as form:
        return [(name, await _value(value)) for name, value in form.multi_items()]


async def _value(value: UploadFile | str) -> str | bytes:
    return await value.read() if isinstance(value, UploadFile) else value


def edit_routes(route: EditRoute) -> APIRouter:
    """The one route; its form is documented in the OpenAPI description by the names of its fields."""
    routes = APIRouter()
    fields = {
        name: {"type": "string", **({"format": "binary"} if name in ("image", "mask") else {})}
        for name in known_fields()
    }
    form = {"schema": {"type": "object", "properties": fields, "required": ["image", "prompt"]}}
    routes.add_api_route(
        "/v1/images/edits", route.__call__, methods=["POST"], summary="Edit a picture by an instruction",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": form}}},
    )  # fmt: skip
    return routes
