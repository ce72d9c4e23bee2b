#!/usr/bin/env python3
"""How finely the latents encode: drawn truths of edits, encoded, with noise on their latents, decoded and read.

    python bench/latent_noise.py --count 360
    python bench/latent_noise.py --checkpoint build/pretrain/vae.pt    # an autoencoder that jobs/pretrain.py trains
    python bench/latent_noise.py --count 540 --begin 0 9 13 16 18 --task replace

Noise is in parts of the latents' own deviation, so that autoencoders of different scales compare. With --begin, the
edit model takes only the steps from each of these on, from the truth with that step's noise on it: where a picture
that was right comes out wrong, the model decides wrongly at that noise or below.
"""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from ip2p.editing.denoiser import GuidedDenoiser
from ip2p.editing.editor import image_latents
from ip2p.editing.guidance import needed_rows, row_images, row_states
from ip2p.evaluation.edit_success import OTHER_EXAM, held_out_examples, read_pictures
from ip2p.evaluation.exact_edits import asked_changes, attribute_accuracy, judge_edit
from ip2p.models.coding import latents_of, pictures_of, scaled, text_states
from ip2p.models.components import embedded_folder, load_edit_model
from ip2p.pairs.sampling import PairNoise, euler_ancestral
from ip2p.pairs.sigmas import sigma_table
from ip2p.postcards.family.drawings import SIZE
from ip2p.postcards.grammar import TASKS, EditExample
from ip2p.postcards.reader import Reading, load_reader
from ip2p.postcards.renderer import render
from ip2p.seeds import derive_seed

CALL = 60


def shares(examples: list[EditExample], before: list[Reading], after: list[Reading]) -> dict[str, float]:
    """Percent exact, and percent whose attributes are those of the drawn truth."""
    changes = [asked_changes(example.scene, example.edited_scene) for example in examples]
    exact = sum(judge_edit(*one).exact for one in zip(before, after, changes, strict=True)) / len(examples)
    right = attribute_accuracy(after, [example.edited_scene for example in examples])
    return {name: round(100 * share, 1) for name, share in {"exact": exact, **right}.items()}


def decoded(vae: typing.Any, latents: torch.Tensor) -> list[typing.Any]:
    return [picture for part in latents.split(CALL) for picture in pictures_of(vae, part)]


def late_edits(
    model: typing.Any, examples: list[EditExample], pictures: list[typing.Any], truth: torch.Tensor
) -> Callable[[int], torch.Tensor]:
    """The edits' latents by ``first``, of 20 steps the first that is taken; from 0 on they begin with noise alone."""
    count, config = len(examples), model.scheduler_config
    states, nulls = (text_states(model, texts) for texts in ([e.instruction for e in examples], [""] * count))
    rows = needed_rows([model.guidance_scale] * count, [model.image_guidance_scale] * count)
    given = rows, row_states(rows, states, nulls), row_images(rows, image_latents(model, pictures))
    seeds = [derive_seed("exam", 0, i) for i in range(count)]

    def begun_at(first: int) -> torch.Tensor:
        denoise = GuidedDenoiser(model.unet, *given, config, 20, first=first)
        noise = PairNoise(seeds, tuple(truth.shape[1:]))
        start = (truth if first else torch.zeros_like(truth)) + noise()[:, 0] * denoise.sigmas[0]
        return euler_ancestral(denoise, start, denoise.sigmas, lambda: noise()[:, 0])

    return begun_at


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=180, help="held-out edits, all tasks (default %(default)s)")
    parser.add_argument("--task", choices=TASKS, help="only those of this task")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.3, 0.47, 0.7], help="in deviations")
    parser.add_argument("--checkpoint", type=Path, help="vae.pt of jobs/pretrain.py, not the family's own")
    parser.add_argument(
        "--begin", type=int, nargs="+", default=[], metavar="STEP", help="first step of 20 that is taken"
    )
    args = parser.parse_args()
    model, reader = load_edit_model(device="cpu"), load_reader(embedded_folder("reader"))
    if args.checkpoint:
        if args.begin:
            parser.error("--begin needs the family's own autoencoder: its UNet knows no other latents")
        model.vae.load_state_dict(torch.load(args.checkpoint, map_location="cpu", weights_only=True)["average"])
    examples = [one for one in held_out_examples(args.count, OTHER_EXAM) if args.task in (None, one.task)]
    pictures = [render(example.scene, SIZE) for example in examples]
    before = read_pictures(reader, pictures)
    drawn = [render(example.edited_scene, SIZE) for example in examples]
    truth = torch.cat(
        [scaled(model.vae, latents_of(model.vae, drawn[i : i + CALL])) for i in range(0, len(drawn), CALL)]
    )
    for noise in args.noise if not args.begin else ():
        drift = noise * truth.std() * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
        after = read_pictures(reader, decoded(model.vae, truth + drift))
        print(json.dumps({"noise": noise, **shares(examples, before, after)}), flush=True)
    if args.begin:
        begun_at, sigmas = (
            late_edits(model, examples, pictures, truth),
            sigma_table(model.scheduler_config, 20).tolist(),
        )
    for first in args.begin:
        after = read_pictures(reader, decoded(model.vae, begun_at(first)))
        numbers = {"begin": first, "sigma": round(sigmas[first], 2), **shares(examples, before, after)}
        print(json.dumps(numbers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
