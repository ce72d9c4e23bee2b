from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ip2p.pairs.alignment import align_tokens

BOS, EOS = 98, 99


def padded(tokens: list[int], window: int = 10) -> list[int]:
    ids = [BOS, *tokens, EOS]
    return ids + [EOS] * (window - len(ids))


def test_equal_captions_map_every_token_and_all_padding_one_to_one() -> None:
    share, own = align_tokens(padded([1, 2, 3]), padded([1, 2, 3]), EOS)
    assert np.array_equal(share, np.eye(10))
    assert not own.any()
    assert share.dtype == own.dtype == np.float32


def test_swapped_word_takes_over_the_attention_of_the_word_it_replaces() -> None:
    share, own = align_tokens(padded([1, 2, 3]), padded([1, 7, 3]), EOS)
    assert np.array_equal(share, np.eye(10))
    assert not own.any()


def test_longer_replacement_divides_each_replaced_column_equally() -> None:
    share, own = align_tokens(padded([1, 2, 3]), padded([1, 7, 8, 3]), EOS)
    assert share[2].tolist() == share[3].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0]
    assert share[4, 3] == 1  # 3 is unchanged
    assert share[5, 4] == 1  # EOS follows EOS, one place later
    assert not own.any()


def test_shorter_replacement_takes_all_of_what_it_replaces() -> None:
    share, _ = align_tokens(padded([1, 2, 5, 3]), padded([1, 7, 3]), EOS)
    assert share[2].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_inserted_words_keep_their_own_attention_and_the_rest_moves_on() -> None:
    share, own = align_tokens(padded([1, 2]), padded([1, 6, 7, 2]), EOS)
    assert np.flatnonzero(own).tolist() == [2, 3]
    assert share[1, 1] == share[4, 2] == share[5, 3] == 1
    assert share[[2, 3]].sum() == 0


def test_after_a_deletion_the_padding_that_the_caption_lacks_keeps_its_own_attention() -> None:
    share, own = align_tokens(padded([1, 2, 3, 4]), padded([1, 4]), EOS)
    assert share[2, 4] == share[3, 5] == 1  # the word, EOS
    assert share[:, 2].sum() == share[:, 3].sum() == 0  # what was deleted goes nowhere
    assert np.flatnonzero(own).tolist() == [8, 9]


def test_sequence_without_end_is_all_tokens() -> None:
    share, own = align_tokens([BOS, 1, 2], [BOS, 1, 3], EOS)
    assert np.array_equal(share, np.eye(3))
    assert not own.any()


def test_padding_id_may_differ_from_the_end_id() -> None:
    share, own = align_tokens([BOS, 1, EOS, 0, 0], [BOS, 1, 2, EOS, 0], EOS)
    assert share[3, 2] == share[4, 3] == 1
    assert np.flatnonzero(own).tolist() == [2]


def test_padding_does_not_pull_a_word_away_from_its_neighbour() -> None:
    share, _ = align_tokens(padded([5, 2, 5, 3, 2]), padded([1, 5, 2]), EOS)
    assert share[2, 1] == share[3, 2] == 1  # "5 2" stays together, though the last 2 stands before the padding
    assert share[4, 6] == 1


captions = st.lists(st.integers(0, 5), max_size=8)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(original=captions, edited=captions)
def test_every_token_has_exactly_one_source_of_attention_and_no_column_is_spent_twice(original, edited) -> None:
    share, own = align_tokens(padded(original), padded(edited), EOS)
    assert np.array_equal(own == 1, share.sum(axis=1) == 0)
    assert set(np.unique(own)) <= {0.0, 1.0}
    columns = share.sum(axis=0)
    assert np.all(np.isclose(columns, 1) | (columns == 0))
    assert share[0, 0] == 1
    assert share[1 + len(edited), 1 + len(original)] == 1
