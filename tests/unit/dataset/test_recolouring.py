"""Recoloured pairs: the same other order of channels in both pictures, training pairs that match, nothing else."""

from __future__ import annotations

import collections
import math
import re

import numpy as np
import pytest

from ip2p.cli import main
from ip2p.dataset.imported import ImportedPair, ImportedPrompt, write_imported_run
from ip2p.dataset.recolouring import ORDERS, recolour_run
from ip2p.dataset.run_folder import iterate_pairs, verify
from ip2p.errors import DatasetError, InputError
from ip2p.images import decode_image
from ip2p.schema import Triplet
from ip2p.storage import open_folder

PICTURES = ("original_image", "edited_image")


def pixels(pair, name):
    return decode_image(pair[name]["bytes"])


def orders_of(was, now):
    """The orders of channels that give ``now`` from ``was``, for both pictures at once."""
    return [
        order
        for order in ORDERS
        if all(np.array_equal(pixels(was, name)[:, :, list(order)], pixels(now, name)) for name in PICTURES)
    ]


def test_both_pictures_have_their_channels_in_the_same_other_order(run, tmp_path):
    output = open_folder(str(tmp_path / "recoloured"))
    report = recolour_run(run, output, re.compile("NIGHT", re.IGNORECASE), times=2)
    before = [pair for pair in iterate_pairs(run) if pair["split"] == "train"]
    after = list(iterate_pairs(output))
    assert verify(output) == []
    assert report.pairs == len(after) == 2 * len(before) > 0
    by_seed = collections.defaultdict(list)
    for pair in after:
        by_seed[pair["seed"]].append(pair)
    found = []
    for was in before:
        two = [orders_of(was, now) for now in by_seed[was["seed"]]]
        assert [len(orders) for orders in two] == [1, 1]
        assert two[0] != two[1]
        found += [order for orders in two for order in orders]
    assert len(set(found)) > 2  # not the same order for all
    assert len({pair["pair_id"] for pair in after}) == len(after)


def test_words_that_may_have_become_untrue_are_gone(run, tmp_path):
    output = open_folder(str(tmp_path / "recoloured"))
    recolour_run(run, output, re.compile("night"))
    for pair in iterate_pairs(output):
        assert (pair["instruction"], pair["caption"], pair["edited_caption"]) == ("make it night", "", "")
        assert pair["split"] == "train"
        assert math.isnan(pair["sim_direction"])
        assert not math.isnan(pair["guidance_scale"])


def test_what_is_held_out_is_left_alone(run, tmp_path):
    pair = next(iterate_pairs(run))
    size = (pair["width"], pair["height"])
    pictures = (ImportedPair(seed, *(pair[name]["bytes"] for name in PICTURES), size) for seed in range(3))
    prompts = [
        ImportedPrompt(split, Triplet("a boat", "make it night", "a boat at night"), (picture,), split=split)
        for split, picture in zip(("val", "train", "test"), pictures, strict=True)
    ]
    folders = [open_folder(str(tmp_path / name)) for name in ("mixed", "recoloured")]
    write_imported_run(prompts, folders[0], {"format": "test", "source": "here"})
    recolour_run(*folders, re.compile("night"))
    assert [(one["seed"], one["split"]) for one in iterate_pairs(folders[1])] == [(1, "train")]


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    folders = [open_folder(str(tmp_path / name)) for name in ("one", "two")]
    for folder in folders:
        recolour_run(run, folder, re.compile("night"), times=3)
    one, two = (list(iterate_pairs(folder)) for folder in folders)
    assert [_bytes(pair) for pair in one] == [_bytes(pair) for pair in two]


def _bytes(pair):
    return [pair["pair_id"], *(pair[name]["bytes"] for name in PICTURES)]


def test_edits_that_do_not_match_are_left_out(run, tmp_path):
    with pytest.raises(DatasetError, match="no usable pair"):
        recolour_run(run, open_folder(str(tmp_path / "recoloured")), re.compile("replace"))


def test_command_counts_and_refuses(run, tmp_path, capsys):
    arguments = ["recolour", "--quiet", "--input", str(run.root), "--output", str(tmp_path / "recoloured")]
    assert main([*arguments, "--only", "make it NIGHT", "--times", "5"]) == 0
    train = [pair for pair in iterate_pairs(run) if pair["split"] == "train"]
    assert f" {5 * len(train)} pairs" in capsys.readouterr().out
    for wrong, message in ((["--only", "night", "--times", "6"], "1 to 5, got 6"), (["--only", "("], "no regular")):
        assert main([*arguments, *wrong]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        recolour_run(run, open_folder(str(tmp_path / "other")), re.compile("night"))
