"""From a checked form to edits under way, and from finished edits to an answer."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ip2p import __version__
from ip2p.editing.edit_request import EditRequest
from ip2p.editing.engine import Edit
from ip2p.errors import EngineClosedError, InputError
from ip2p.images import encode_image
from ip2p.models.coding import pictures_of
from serve.api_errors import ApiError, api_error
from serve.engines import Engines, Served
from serve.form import MAX_SEED, EditForm, edit_requests
from serve.settings import Settings

DEFAULT_COMPRESSION = 95
TRIES = 3


@dataclass(eq=False)
class Taken:
    """A form's edits, one a variant, and the model that makes them."""

    form: EditForm
    served: Served
    edits: list[Edit]

    def cancel(self) -> None:
        """Nobody waits any more: every edit leaves before its next step."""
        for edit in self.edits:
            edit.cancel()


async def take_in(
    form: EditForm, engines: Engines, settings: Settings, on_progress: Callable[[Edit], object] | None = None
) -> Taken:
    """Decode, check and submit all variants, or none. Raises ApiError."""
    seed = secrets.randbelow(MAX_SEED + 1) if form.seed is None else form.seed
    try:
        engines.check_room()  # first: a full server must not spend its time on pictures that it refuses
        requests = await asyncio.to_thread(edit_requests, form, settings, seed)
        await asyncio.to_thread(_let_through, settings, requests[0].image, "input")
        tries_left = TRIES
        while True:
            served = await engines.get(form.model or settings.default_model)
            try:
                return _submitted(form, requests, served, on_progress)
            except EngineClosedError:  # the model made room for another in this very moment
                tries_left -= 1
                if not tries_left:
                    raise
    except Exception as error:
        raise api_error(error) from error


def _submitted(
    form: EditForm, requests: list[EditRequest], served: Served, on_progress: Callable[[Edit], object] | None
) -> Taken:
    """Quick, and not to be interrupted: a client that leaves now finds all of its edits, and ends them."""
    taken = Taken(form, served, [])
    try:
        for request in requests:
            taken.edits.append(served.engine.submit(request, on_progress))
    except InputError as error:
        taken.cancel()
        raise api_error(error, "size" if form.size else "image") from error
    except Exception:
        taken.cancel()
        raise
    return taken


async def finished(taken: Taken, settings: Settings) -> list[np.ndarray]:
    """The edited pictures ``(H, W, 3)`` uint8. If this task is cancelled or one edit fails, so are all."""
    try:
        pictures = await asyncio.gather(*[asyncio.wrap_future(edit.future) for edit in taken.edits])
        for picture in pictures:
            await asyncio.to_thread(_let_through, settings, picture, "output")
        return pictures
    except Exception as error:
        raise api_error(error) from error
    finally:
        taken.cancel()


def _let_through(settings: Settings, picture: np.ndarray, which: str) -> None:
    if settings.picture_check is None:
        return
    reason = settings.picture_check(picture, which)
    if reason is not None:
        raise ApiError(400, "picture_refused", f"the {which} picture was refused: {reason}", "image")


async def files_of(taken: Taken, pictures: list[np.ndarray]) -> list[bytes]:
    """The file of every variant."""
    return await asyncio.to_thread(lambda: [encoded(taken, place, one) for place, one in enumerate(pictures)])


def encoded(taken: Taken, place: int, picture: np.ndarray) -> bytes:
    """The file of the ``place``-th variant; it says in itself how it came about."""
    form = taken.form
    quality = DEFAULT_COMPRESSION if form.output_compression is None else form.output_compression
    return encode_image(picture, form.output_format, quality, json.dumps(provenance(taken, place), sort_keys=True))


def provenance(taken: Taken, place: int) -> dict[str, typing.Any]:
    """All that repeats an edit of the same picture, and what made it."""
    model = taken.served.model
    request = taken.edits[place].request
    scales = model.scales(request.guidance_scale, request.image_guidance_scale)
    return {
        "software": f"ip2p {__version__}",
        "digital_source_type": "trainedAlgorithmicMedia",  # IPTC's word for a picture that a model made
        "model": taken.served.name,
        "unet_sha256": model.sha256["unet"],
        "instruction": request.instruction,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "sampler": request.sampler,
        "guidance_scale": scales[0],
        "image_guidance_scale": scales[1],
        "guidance_interval": list(request.guidance_interval),
        "size": request.size,
        "resolution": request.resolution,
        "restore_size": request.restore_size,
    }


async def answer(taken: Taken, pictures: list[np.ndarray]) -> dict[str, typing.Any]:
    """OpenAI's ImagesResponse; what is ours stands under ``ip2p``."""
    files = await files_of(taken, pictures)
    return {
        "created": int(time.time()),
        **look(taken, pictures[0]),
        "data": [{"b64_json": base64.b64encode(file).decode()} for file in files],
        "usage": usage(taken),
        "ip2p": details(taken),
    }


def look(taken: Taken, picture: np.ndarray) -> dict[str, str]:
    """What OpenAI's answers and events say of a picture's form."""
    height, width = picture.shape[:2]
    form = taken.form
    return {
        "background": "opaque", "output_format": form.output_format, "quality": "auto", "size": f"{width}x{height}",
    }  # fmt: skip


def usage(taken: Taken) -> dict[str, typing.Any]:
    """Nominal counts, as OpenAI's type asks for them: rows of the UNet are what an edit costs here."""
    rows = sum(edit.rows for edit in taken.edits)
    none = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": none, "output_tokens": rows, "total_tokens": rows}


def details(taken: Taken) -> dict[str, typing.Any]:
    """How it went: what repeats it, and where the time was spent."""
    first = provenance(taken, 0)
    begun = [edit.begun_at or edit.submitted_at for edit in taken.edits]
    ended = [edit.ended_at or time.monotonic() for edit in taken.edits]
    submitted = min(edit.submitted_at for edit in taken.edits)
    return {
        **{name: first[name] for name in first if name not in ("software", "digital_source_type", "instruction")},
        "seeds": [edit.request.seed for edit in taken.edits],
        "truncated": any(edit.cut for edit in taken.edits),
        "row_evals": sum(edit.rows for edit in taken.edits),
        "queue_ms": round((min(begun) - submitted) * 1000),
        "edit_ms": round((max(ended) - submitted) * 1000),
    }


def preview_file(taken: Taken, edit: Edit, latent: typing.Any, settings: Settings) -> tuple[np.ndarray, bytes]:
    """What an edit under way looks like: the estimate of its end, decoded, at the size of the edit."""
    import torch

    with torch.inference_mode():
        picture = pictures_of(taken.served.model.vae, latent[None])[0]
    _let_through(settings, picture, "output")
    return picture, encode_image(picture, taken.form.output_format)
