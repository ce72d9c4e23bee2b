"""``ip2p postcard``: draws postcards to look at."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

HELP = """Draw a postcard, a sheet of them, or edits with their exact answers.

  ip2p postcard --seed 7 --output card.png
  ip2p postcard --seed 0 --sheet 48 --output sheet.png
  ip2p postcard --seed 0 --edits 12 --output edits.png
  ip2p postcard --seed 0 --triplets 5000 --output triplets.jsonl     # for jobs/datagen.py --triplets and ip2p invert
  ip2p postcard --seed 0 --triplets 5000 --pictures --output triplets.jsonl    # and each caption drawn, in a folder
  ip2p postcard --seed 0 --manifest 24 --output s3://bucket/in       # pictures and edits.jsonl, for jobs/batch_edit.py
  ip2p postcard --seed 0 --restorations 60000 --output out/restorations    # a run to train on before painted pairs
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="which postcard; the first of a sheet (default 0)")
    parser.add_argument("--output", required=True, help="PNG (or .jsonl) file to write; of --manifest a folder")
    parser.add_argument("--size", type=int, default=None, help="pixels a side (default 512; on sheets 96)")
    parser.add_argument("--sheet", type=int, default=0, metavar="N", help="draw N postcards on one sheet")
    parser.add_argument("--edits", type=int, default=0, metavar="N", help="draw N postcards beside their edits")
    parser.add_argument(
        "--triplets", type=int, default=0, metavar="N", help="write N edits in words and the way back of each (.jsonl)"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="draw what --triplets captions too, for pairs.original=given"
    )
    parser.add_argument(
        "--manifest", type=int, default=0, metavar="N", help="draw N postcards and write what to edit (a folder)"
    )
    parser.add_argument(
        "--restorations",
        type=int,
        default=0,
        metavar="N",
        help="write a run of N drawings with a patch gone (a folder)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not print the captions")


def run(args: argparse.Namespace) -> int:
    from ip2p.errors import InputError
    from ip2p.storage import open_folder

    if args.size is not None and not 16 <= args.size <= 2048:
        raise InputError(f"--size must be 16 to 2048 pixels, got {args.size}")
    wanted = (args.sheet, args.edits, args.triplets, args.manifest, args.restorations)
    if min(wanted) < 0 or sum(number > 0 for number in wanted) > 1:
        names = "--sheet, --edits, --triplets, --manifest and --restorations"
        raise InputError(f"{names} take a positive number, and only one of them may be given")
    if args.pictures and not args.triplets:
        raise InputError("--pictures goes with --triplets")
    if args.manifest:
        for name, data in _manifest(args.manifest, args.seed, args.size or 64):
            open_folder(args.output).write(name, data)
        return 0
    if args.restorations:
        return _restorations(args.restorations, args.seed, args.output, args.quiet)
    place, _, file = args.output.rpartition("/")
    folder = open_folder(place or ("/" if args.output.startswith("/") else "."))
    if args.triplets:
        for name, data in _triplets(args.triplets, args.seed, file, (args.size or 64) if args.pictures else 0):
            folder.write(name, data)
        return 0
    size = args.size or (96 if args.sheet or args.edits else 512)
    pictures, lines = _drawn(args.seed, size, args.sheet, args.edits)
    folder.write(file, _tiled(pictures, 2 if args.edits else 8))
    if not args.quiet:
        print("\n".join(lines))
    return 0


def _triplets(count: int, seed: int, file: str, size: int) -> Iterator[tuple[str, bytes]]:
    """Files: a picture an edit, unless ``size`` is 0; then a line for each edit, and one for each way back.

    ``ip2p invert`` finds the ways back by their captions.
    """
    import json

    from ip2p.images import encode_image
    from ip2p.postcards.renderer import render
    from ip2p.postcards.triplets import postcard_triplets

    there, back = [], []
    for number, (example, words_back) in enumerate(postcard_triplets(count, seed)):
        names = ("caption", "instruction", "edited_caption")
        there.append(dict(zip(names, (example.caption, example.instruction, example.edited_caption), strict=True)))
        there[-1]["task"] = example.task
        back.append(dict(zip(names, (example.edited_caption, words_back, example.caption), strict=True)))
        if size:
            there[-1]["url"] = f"{file.removesuffix('.jsonl')}-pictures/{number:06d}.png"
            yield there[-1]["url"], encode_image(render(example.scene, size))
    yield file, "".join(json.dumps(row) + "\n" for row in [*there, *back]).encode()


def _restorations(count: int, first: int, output: str, quiet: bool) -> int:
    from tqdm import tqdm

    from ip2p.dataset.imported import write_imported_run
    from ip2p.postcards.restorations import restorations
    from ip2p.storage import open_folder

    with tqdm(total=count, unit=" drawings", disable=True if quiet else None) as bar:
        source = {"format": "restoration", "source": f"drawings {first} to {first + count - 1}"}
        report = write_imported_run(restorations(first, count), open_folder(output), source, bar.update)
    print(f"{output}: {report.pairs} pairs")
    return 0


def _manifest(count: int, seed: int, size: int) -> Iterator[tuple[str, bytes]]:
    """Files of a batch: pictures, then the manifest of what to do with them."""
    import json

    import numpy as np

    from ip2p.images import encode_image
    from ip2p.postcards.grammar import sample_example
    from ip2p.postcards.renderer import render
    from ip2p.postcards.scene import sample_scene

    rows = []
    for number in range(seed, seed + count):
        rng = np.random.default_rng(number)
        example = sample_example(sample_scene(rng, held_out=None), rng)
        yield f"postcard-{number}.png", encode_image(render(example.scene, size))
        rows.append({"id": str(number), "image": f"postcard-{number}.png", "instruction": example.instruction})
    yield "edits.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


def _drawn(seed: int, size: int, sheet: int, edits: int):  # type: ignore[no-untyped-def]
    """Pictures in reading order and a line of text for each."""
    import numpy as np

    from ip2p.postcards.grammar import caption_of, sample_example, sample_wording
    from ip2p.postcards.renderer import render
    from ip2p.postcards.scene import sample_scene

    pictures, lines = [], []
    for number in range(seed, seed + (edits or sheet or 1)):
        rng = np.random.default_rng(number)
        scene = sample_scene(rng, held_out=None)
        pictures.append(render(scene, size))
        if edits:
            example = sample_example(scene, rng)
            pictures.append(render(example.edited_scene, size))
            lines.append(f"{number}: {example.caption} | {example.instruction} | {example.edited_caption}")
        else:
            lines.append(f"{number}: {caption_of(scene, sample_wording(rng))}")
    return pictures, lines


def _tiled(pictures: list, columns: int) -> bytes:  # type: ignore[type-arg]
    import numpy as np

    from ip2p.images import encode_image

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    side = pictures[0].shape[0]
    sheet = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        y, x = (place // columns) * side, (place % columns) * side
        sheet[y : y + side, x : x + side] = picture
    return encode_image(sheet)
