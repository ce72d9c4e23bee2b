"""``ip2p edit``: one picture, one instruction. Flags, files and printing only; the flags' names are the original's."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

HELP = """Edit a picture by an instruction.

  ip2p edit --input in.png --output out.png --edit "make it night"
  ip2p edit --input in.jpg --output out.jpg --edit "make it night" --ckpt DIR --cfg-image 1.2 --seed 7

If the picture changes too little, raise --cfg-text or lower --cfg-image; if it changes too much, the other way round;
or try another --seed or other words.
"""

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    parser.add_argument("--input", required=True, metavar="FILE", help="PNG, JPEG or WebP, local or s3://")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="PNG or JPEG file to write")
    parser.add_argument("--edit", required=True, metavar="TEXT", help="the instruction; empty: only resize")
    parser.add_argument("--ckpt", default="embedded", metavar="DIR", help="diffusers folder (default: the shipped one)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="PNG file of before and after, side by side")
    parser.add_argument("--steps", type=int, default=100, help="denoising steps (default %(default)s)")
    parser.add_argument("--resolution", type=int, help="pixels of the long side, nearly (default: the model's own)")
    parser.add_argument("--seed", type=int, help="repeats an edit (default: drawn at random and printed)")
    parser.add_argument("--cfg-text", type=float, help="guidance by the instruction (default: the model's own, or 7.5)")
    parser.add_argument("--cfg-image", type=float, help="guidance by the picture (default: the model's own, or 1.5)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what the result should not look like")
    parser.add_argument("--sampler", choices=("euler_ancestral", "dpmpp_2m"), default="euler_ancestral")
    parser.add_argument("--restore-size", action="store_true", help="cut nothing off and give the input's size back")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the UNet")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Edit and print what repeats it. Raises an Ip2pError with the remedy where it cannot."""
    from ip2p.editing.before_after import draw_rows
    from ip2p.editing.editor import Editor, check_settings
    from ip2p.images import encode_image
    from ip2p.models.components import load_edit_model
    from ip2p.pictures import read_picture
    from ip2p.storage import LocalFolder

    image_format = _format(args.output)
    seed = random.randrange(100_000) if args.seed is None else args.seed
    # Before the model is loaded, which takes longest.
    check_settings(args.steps, args.sampler, seed, args.cfg_text, args.cfg_image)
    picture = read_picture(args.input)
    editor = Editor(load_edit_model(args.ckpt, args.dtype, args.device))
    edited = _edit(editor, picture, seed, args)
    LocalFolder(args.output.parent).write(args.output.name, encode_image(edited, image_format))
    if args.compare:
        LocalFolder(args.compare.parent).write(args.compare.name, draw_rows([(picture, edited)], [args.edit]))
    height, width = edited.shape[:2]
    print(f"{args.output}: {width} x {height} pixels, --seed {seed}")
    return 0


def _edit(editor, picture, seed: int, args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from tqdm import tqdm

    # disable=None hides the bar where stderr is no terminal.
    with tqdm(total=args.steps, unit="step", disable=True if args.quiet else None) as bar:
        edited = editor.edit(
            [picture],
            [args.edit],
            steps=args.steps,
            guidance_scale=args.cfg_text,
            image_guidance_scale=args.cfg_image,
            seed=seed,
            negative_prompt=args.negative,
            resolution=args.resolution,
            sampler=args.sampler,
            restore_size=args.restore_size,
            on_step=bar.update,
        )
    return edited[0]


def _format(output: Path) -> str:
    from ip2p.errors import InputError

    if output.suffix.lower() not in FORMATS:
        raise InputError(f"--output {output}: expected a name that ends in {', '.join(FORMATS)}")
    return FORMATS[output.suffix.lower()]
