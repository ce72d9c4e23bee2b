from __future__ import annotations

import pytest

from ip2p.training.sides import names_a_side


@pytest.mark.parametrize(
    "text",
    [
        "move it to the LEFT", "a right-handed player", "the rightmost boat", "a leftward wind", "sail north-west",
        "facing southeast", "an eastern wall", "westbound", "turn it clockwise", "anticlockwise", "counter-clockwise",
        "mirror it", "flipped over", "add the word hello", "a sign that says stop", "written in sand", "a logo",
    ],
)  # fmt: skip
def test_sides_turns_and_writing_forbid_a_flip(text: str) -> None:
    assert names_a_side("make it night", text)


@pytest.mark.parametrize(
    "text",
    [
        "make it night",
        "a bright castle",
        "cleft rock",
        "a feast",
        "the coast",
        "a password-free world",
        "sword",
        "Easter",
    ],
)
def test_other_words_do_not(text: str) -> None:
    assert not names_a_side(text, "a red boat")
