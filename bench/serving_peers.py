"""What a good engineer writes with other parts, for bench/serving.py: diffusers behind Ray Serve.

All take the same JSON, {"image": base64 PNG, "prompt", "num_inference_steps", "guidance_scale",
"image_guidance_scale", "seed"}, and give {"image": base64 PNG}. ``/stats`` says how many UNet rows were run.

    one      Ray Serve, one edit at a time
    batch    Ray Serve with @serve.batch, edits of the same steps and scales together
"""

from __future__ import annotations

import base64
import io
import os
import sys
import typing
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

BATCH = 8
WAIT_S = 0.05
Job = dict[str, typing.Any]


class Diffusers:
    """diffusers' own pipeline on the embedded model."""

    def __init__(self, threads: int):
        from diffusers import StableDiffusionInstructPix2PixPipeline

        from ip2p.models.components import embedded_folder

        torch.set_num_threads(threads)
        self.pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            embedded_folder("edit_model"), torch_dtype=torch.float32, safety_checker=None
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.rows = 0
        self.pipeline.unet.register_forward_pre_hook(self._count)

    def _count(self, unet: typing.Any, given: tuple[torch.Tensor, ...]) -> None:
        self.rows += len(given[0])

    def edit(self, jobs: list[Job]) -> list[Job]:
        """Jobs of one signature in one call."""
        first = jobs[0]
        pictures = self.pipeline(
            [job["prompt"] for job in jobs],
            image=[Image.open(io.BytesIO(base64.b64decode(job["image"]))).convert("RGB") for job in jobs],
            num_inference_steps=first["num_inference_steps"],
            guidance_scale=first["guidance_scale"],
            image_guidance_scale=first["image_guidance_scale"],
            generator=[torch.Generator().manual_seed(job["seed"]) for job in jobs],
        ).images
        return [{"image": _encoded(picture)} for picture in pictures]

    def edit_grouped(self, jobs: list[Job]) -> list[Job]:
        """Jobs of any signatures: one call for each."""
        groups = defaultdict(list)
        for place, job in enumerate(jobs):
            groups[job["num_inference_steps"], job["guidance_scale"], job["image_guidance_scale"]].append(place)
        answers: list[Job] = [{}] * len(jobs)
        for places in groups.values():
            for place, answer in zip(places, self.edit([jobs[place] for place in places]), strict=True):
                answers[place] = answer
        return answers


def _encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def serve_app(args: dict[str, str]) -> typing.Any:
    """For ``serve run bench.serving_peers:serve_app batching=yes threads=2``."""
    from ray import serve
    from starlette.requests import Request

    batching, threads = args.get("batching") == "yes", int(args.get("threads", 2))

    @serve.deployment(max_ongoing_requests=64 if batching else 1, ray_actor_options={"num_cpus": 1})
    class Peer:
        def __init__(self) -> None:
            self.diffusers = Diffusers(threads)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
        async def together(self, jobs: list[Job]) -> list[Job]:
            import asyncio

            return await asyncio.to_thread(self.diffusers.edit_grouped, jobs)

        async def __call__(self, request: Request) -> Job:
            if request.url.path == "/stats":
                return {"rows": self.diffusers.rows, "pid": os.getpid()}
            job = await request.json()
            return await self.together(job) if batching else self.diffusers.edit([job])[0]

    return Peer.bind()
