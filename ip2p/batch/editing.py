"""What does the edits of a batch: an engine in this process, a server that has time, or nothing at all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import typing
from collections.abc import Mapping

import numpy as np
import urllib3

from ip2p.editing.edit_request import EditRequest
from ip2p.errors import EditError, InputError, PictureError, StorageError
from ip2p.images import encode_image
from ip2p.pictures import decode_picture

SERVER_TIMEOUT_S = 300.0
Form = dict[str, str | tuple[str, bytes, str]]


class EngineEditing:
    """An engine of its own, with calls of ``call_rows`` rows; raises InputError where those do not give fixed bytes."""

    def __init__(self, ckpt: str, dtype: str, device: str, call_rows: int, threads: int = 0):
        import torch

        from ip2p.editing.engine import EditEngine
        from ip2p.editing.fixed_calls import check_fixed_calls
        from ip2p.editing.step_cost import StepCost
        from ip2p.models.coding import edit_sizes, pixels_per_latent
        from ip2p.models.components import load_edit_model

        if threads:
            torch.set_num_threads(threads)
        model = load_edit_model(ckpt, dtype, device)
        side = edit_sizes(model)[1] // pixels_per_latent(model.vae.config)
        check_fixed_calls(model, (model.vae.config.latent_channels, side, side), call_rows)
        # Nothing here asks how long work takes, so no call is measured.
        self.engine = EditEngine(model, StepCost({call_rows: 1.0}), call_rows=call_rows)

    @property
    def row_evals(self) -> int:
        return self.engine.row_evals

    def edit(self, request: EditRequest) -> np.ndarray:
        return self.engine.submit(request).future.result()

    def close(self) -> None:
        self.engine.close()


class ServerEditing:
    """The batch lane of a server of `ip2p serve`: idle replicas do the work, people's edits go first.

    Results are those of the engine there, to 1/255. Raises InputError for a ``url`` that is none.
    """

    row_evals = 0  # the server's to count

    def __init__(self, url: str, key: str = "", timeout_s: float = SERVER_TIMEOUT_S, connections: int = 64):
        check_address(url)
        self.url, self.key = url.rstrip("/"), key
        self._pool = urllib3.PoolManager(maxsize=connections, retries=False, timeout=timeout_s)

    def edit(self, request: EditRequest) -> np.ndarray:
        fields = _form_of(request)
        while True:
            answer = self._posted(fields)
            if answer.status == 200:
                return self._picture(answer)
            if answer.status != 429:
                raise self._error(answer)
            # Its queue is full, and people's edits come first: nobody has failed.
            time.sleep(float(answer.headers.get("retry-after-ms", 1000)) / 1000)

    def close(self) -> None:
        self._pool.clear()

    def _posted(self, fields: Form) -> urllib3.BaseHTTPResponse:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            return self._pool.request("POST", f"{self.url}/v1/images/edits", fields=fields, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise StorageError(f"{self.url}: cannot reach the server ({error})", "away") from error

    def _picture(self, answer: urllib3.BaseHTTPResponse) -> np.ndarray:
        try:
            return decode_picture(base64.b64decode(answer.json()["data"][0]["b64_json"]), "the answer")
        except (ValueError, LookupError, TypeError, PictureError) as error:  # not the fault of what was asked
            raise EditError(f"{self.url}: the answer holds no picture ({error})") from error

    def _error(self, answer: urllib3.BaseHTTPResponse) -> Exception:
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {answer.status}"
        if answer.status in (401, 403):
            return StorageError(f"{self.url}: the server refused the key ({message}); set IP2P_API_KEY", "refused")
        if answer.status in (502, 503, 504):
            return StorageError(f"{self.url}: {message}", "away")
        return InputError(message) if answer.status in (400, 404, 413, 415) else EditError(f"{self.url}: {message}")


def check_address(url: str) -> None:
    """Raise InputError where ``url`` is none: it would look like a server that is away."""
    if not re.match("https?://[^/]", url):
        raise InputError(f"{url!r} is no address of a server; write http://HOST:PORT")


class CopyEditing:
    """Gives pictures back as they are: what a batch costs beside the edits."""

    row_evals = 0

    def edit(self, request: EditRequest) -> np.ndarray:
        return request.image

    def close(self) -> None:
        """Nothing is held."""


def model_id(ids: Mapping[str, str], dtype: str, call_rows: int) -> str:
    """16 hex digits of all that decides an engine's results beside the request."""
    said = json.dumps([dict(sorted(ids.items())), dtype, call_rows])
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _form_of(request: EditRequest) -> Form:
    """The request as the server's form; what is not named is the model's own."""
    fields: dict[str, typing.Any] = {
        "prompt": request.instruction, "num_inference_steps": request.steps, "seed": request.seed,
        "guidance_scale": request.guidance_scale, "image_guidance_scale": request.image_guidance_scale,
        "negative_prompt": request.negative_prompt, "sampler": request.sampler, "resolution": request.resolution,
        "size": "x".join(map(str, request.size)) if request.size else None, "priority": "batch",
        "restore_size": "true" if request.restore_size else None,
    }  # fmt: skip
    form: Form = {name: str(value) for name, value in fields.items() if value not in (None, "")}
    form["image"] = ("image.png", encode_image(request.image), "image/png")
    if request.mask is not None:
        # White is to be edited; a grey picture of three channels says the same as one of a single channel.
        form["mask"] = ("mask.png", encode_image(np.repeat(request.mask[:, :, None], 3, axis=2)), "image/png")
    return form
