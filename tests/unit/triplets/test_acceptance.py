import pytest

from ip2p.schema import TRIPLET_REASONS, Triplet
from ip2p.triplets.acceptance import NearDuplicates, judge, judge_caption, judge_triplet, normalised


def words_and_two(text: str) -> int:
    return len(text.split()) + 2


def says_gun(texts) -> bool:
    return any("gun" in text for text in texts)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("make it night\n%%\na red cat at night\nEND", "ok"),
        ("make it night", "unparseable"),
        ("", "unparseable"),
        ("make it night\n%%\na cat \ud800", "unparseable"),
        ("\n%%\na red cat at night", "empty"),
        ("make it night\n%%\n \t", "empty"),
        ("make it night\n%%\n\u200b\x00", "empty"),
        ("make it night\n%%\nA RED CAT!?", "unchanged"),
        ("make it night\n%%\n a red cat.", "unchanged"),
        ("make it night\n%%\none two three four five six", "ok"),
        ("make it night\n%%\none two three four five six seven", "too_long"),
        ("one two three four five six seven\n%%\na cat", "too_long"),
        ("add a gun\n%%\na cat with hat", "flagged"),
        ("add a toy\n%%\na cat with gun", "flagged"),
    ],
)
def test_a_completion_is_judged_with_a_reason(completion, reason):
    triplet, found = judge("a red cat", completion, words_and_two, 8, says_gun)
    assert found == reason
    assert found in TRIPLET_REASONS
    assert (triplet is not None) == (reason == "ok")


def test_an_accepted_triplet_carries_the_stripped_texts():
    triplet, _ = judge("a cat", " make it night \n%%\n a cat at night \nEND", None, 77)
    assert triplet == Triplet("a cat", "make it night", "a cat at night")


def test_a_caption_beyond_the_window_makes_the_triplet_too_long():
    long = "one two three four five six seven"
    assert judge_triplet(Triplet(long, "edit", "a cat"), words_and_two, 8) == "too_long"
    assert judge_triplet(Triplet(long, "edit", "a cat"), None, 8) == "ok"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a cat", "ok"), ("", "bad_caption"), (" \u200b", "bad_caption"), ("one two three four five six", "ok"),
        ("one two three four five six seven", "too_long"), ("a gun", "flagged"),
    ],
)  # fmt: skip
def test_a_caption_is_judged_before_any_writer_is_asked(caption, reason):
    assert judge_caption(caption, words_and_two, 8, says_gun) == reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  Cat, on a\tmat!", "a cat on a mat"),
        ("red-blue", "red blue"),
        ("ＣＡＴ", "cat"),
        ("🎈🎈", "🎈🎈"),
        ("...", "..."),
        ("C++", "c++"),
    ],
)
def test_normalising_drops_case_punctuation_and_spacing_only(text, expected):
    assert normalised(text) == expected


def test_normalising_keeps_vowel_marks_apart():
    assert normalised("कि") != normalised("की")


TWENTY = "a b c d e f g h i j k l m n o p q r s t"


def test_the_same_edit_of_nearly_the_same_caption_is_a_duplicate():
    duplicates = NearDuplicates()
    assert duplicates.add(TWENTY, "Make it night")
    assert not duplicates.add(TWENTY.upper() + "!", "make it night.")
    assert not duplicates.add(TWENTY.replace("t", "x"), "make it night")  # 22 of 24 words shared


def test_different_edits_of_one_long_caption_are_not_duplicates():
    duplicates = NearDuplicates()
    assert duplicates.add(TWENTY, "make it red")
    assert duplicates.add(TWENTY, "make it blue")


def test_the_overlap_counts_from_nine_tenths_inclusive():
    nine_of_ten = NearDuplicates()
    assert nine_of_ten.add("a b c d e f g h", "night")
    assert not nine_of_ten.add("a b c d e f g h i", "night")  # 9 / 10
    eight_of_nine = NearDuplicates()
    assert eight_of_nine.add("a b c d e f g", "night")
    assert eight_of_nine.add("a b c d e f g h", "night")  # 8 / 9


def test_a_refused_duplicate_is_not_remembered():
    duplicates = NearDuplicates()
    duplicates.add("a b c d e f g h i j k l m n o p q r s", "x")
    assert not duplicates.add("a b c d e f g h i j k l m n o p q r s t u", "x")  # 20 / 22
    assert duplicates.add("a b c d e f g h i j k l m n o p q r s t u v w", "x")  # 20 / 24, 22 / 24 of the refused one
