import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ip2p.schema import Triplet
from ip2p.triplets.format import completion_of, parse_completion, prompt_of

WORDS = st.lists(st.sampled_from(["a", "cat", "##", "%%", "END", "é", "🌙", "night."]), min_size=1).map(" ".join)


def test_prompt_and_completion_are_the_originals_bytes():
    triplet = Triplet("a cat", "make it night", "a cat at night")
    assert prompt_of("a cat") == "a cat\n##\n"
    assert completion_of(triplet) == "make it night\n%%\na cat at night\nEND"


@given(WORDS, WORDS.filter(lambda text: not text.startswith("END")))
@settings(max_examples=60, deadline=None)
def test_a_written_completion_is_read_back(instruction, edited_caption):
    completion = completion_of(Triplet("any", instruction, edited_caption))
    assert parse_completion(completion) == (instruction, edited_caption)


def test_an_edited_caption_that_begins_like_the_stop_cannot_be_told_from_it():
    assert parse_completion(completion_of(Triplet("any", "add a title", "END OF THE LINE poster"))) is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("add a moon\n%%\na boat and a moon", ("add a moon", "a boat and a moon")),
        (" add a moon \n%%\n a boat \nEND", ("add a moon", "a boat")),
        ("add\n%%\na boat\nEND\nadd\n%%\na car", ("add", "a boat")),
        ("add a moon", None),
        ("add\n%%\na boat\n%%\na car\nEND", None),
        ("add\nEND\n%%\na boat", None),
        ("add %% a boat", None),
        ("", None),
        ("\n%%\n", ("", "")),
    ],
)
def test_a_completion_has_exactly_two_parts_before_the_stop(text, parts):
    assert parse_completion(text) == parts
