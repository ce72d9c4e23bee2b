"""Drawings with a patch gone or foreign: the whole drawing is the answer, and nothing but the patch differs."""

from __future__ import annotations

import itertools

import numpy as np

from ip2p.images import decode_image
from ip2p.postcards.family.drawings import SIZE, scene_of
from ip2p.postcards.grammar import caption_of
from ip2p.postcards.renderer import render
from ip2p.postcards.restorations import VAL_EVERY, restorations

MANY = list(restorations(0, 120))


def pictures(number: int) -> tuple[np.ndarray, np.ndarray]:
    pair = MANY[number].pairs[0]
    return decode_image(pair.original), decode_image(pair.edited)


def test_the_answer_is_the_drawing_and_its_caption_the_instruction() -> None:
    for number in range(10):
        scene = scene_of(0, number)
        assert (pictures(number)[1] == render(scene, SIZE)).all()
        triplet = MANY[number].triplet
        assert triplet.caption == triplet.instruction == triplet.edited_caption
        assert scene.object in triplet.instruction or scene.object in caption_of(scene)


def test_a_tenth_is_whole_and_of_the_others_a_part_is_grey_or_of_another_drawing() -> None:
    spoiled = [(original != edited).any(axis=2) for original, edited in map(pictures, range(len(MANY)))]
    whole = sum(not one.any() for one in spoiled)
    grey = sum(bool((pictures(number)[0][one] == 128).all()) for number, one in enumerate(spoiled) if one.any())
    assert 4 <= whole <= 24
    assert 30 <= grey <= 66
    assert len(MANY) - whole - grey >= 40
    shares = [one.mean() for one in spoiled if one.any()]
    assert max(shares) < 0.95
    assert 0.1 < float(np.median(shares)) < 0.6


def test_each_drawing_gives_its_pair_whatever_is_drawn_beside_it() -> None:
    again = next(iter(restorations(57, 1)))
    assert again == MANY[57]


def test_some_are_for_looking_at_the_loss() -> None:
    splits = [prompt.split for prompt in MANY]
    assert [number for number, split in enumerate(splits) if split == "val"] == list(range(0, 120, VAL_EVERY))


def test_another_world_seed_gives_other_drawings() -> None:
    other = list(itertools.islice(restorations(0, 3, seed=1), 3))
    assert all(a.pairs[0].edited != b.pairs[0].edited for a, b in zip(other, MANY, strict=False))
