"""What may be asked of an edit, and what is refused before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ip2p.editing.editor import check_picture, check_settings
from ip2p.errors import InputError

MAX_STEPS = 1000


@dataclass(frozen=True, eq=False)
class EditRequest:
    """One picture, one instruction. None: the model's own; the other defaults are the original's."""

    image: np.ndarray  # (H, W, 3) uint8
    instruction: str  # empty: the resized picture comes back unedited
    steps: int = 100
    guidance_scale: float | None = None  # s_T
    image_guidance_scale: float | None = None  # s_I
    seed: int = 0
    negative_prompt: str = ""
    sampler: str = "euler_ancestral"
    resolution: int | None = None  # pixels
    size: tuple[int, int] | None = None  # width and height of the result instead, cut to; whole cells of the model
    restore_size: bool = False
    mask: np.ndarray | None = None  # (H, W) uint8, 255 = edit, 0 = keep, as large as the image
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the steps
    batch: bool = False  # in the lane that gives way
    alone: bool = False  # its UNet calls hold nothing else: the same bytes every time, on one device
    previews: int = 0  # how many estimates to give on the way, evenly spaced
    deadline_s: float | None = None  # seconds from now; later than that nobody wants it


def check_request(request: EditRequest) -> None:
    """Raise InputError for what cannot be done."""
    scales = (request.guidance_scale, request.image_guidance_scale)
    check_settings(request.steps, request.sampler, request.seed, *scales)
    if request.steps > MAX_STEPS:
        raise InputError(f"steps must be at most {MAX_STEPS}, got {request.steps}")
    check_picture(request.image)
    if request.mask is not None and request.mask.shape != request.image.shape[:2]:
        found, wanted = (f"{shape[1]} x {shape[0]}" for shape in (request.mask.shape, request.image.shape))
        raise InputError(f"mask of {found} pixels for a picture of {wanted}; make it as large as the picture")
    if request.size is not None and (request.restore_size or request.resolution is not None):
        raise InputError("size says all of the result's size; leave out resolution and restore_size")
    first, last = request.guidance_interval
    if not 0 <= first <= last <= 1:
        raise InputError(
            f"guidance_interval must be two rising shares of the steps from 0 to 1, got {first} and {last}"
        )
    if request.previews < 0:
        raise InputError(f"previews must be at least 0, got {request.previews}")
    if request.deadline_s is not None and request.deadline_s <= 0:
        raise InputError(f"deadline_s must be above 0 s, got {request.deadline_s:g}")
