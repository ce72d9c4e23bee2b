"""Fewer rows, the same answer."""

from __future__ import annotations

import pytest
import torch

from ip2p.editing.guidance import FULL, IMAGE, NULL, combine, needed_rows, row_images, row_states

SCALES = [
    (7.5, 1.5, {NULL, IMAGE, FULL}),
    (7.5, 1.0, {IMAGE, FULL}),
    (2.3, 2.3, {NULL, FULL}),
    (1.0, 1.0, {FULL}),
    (0.0, 1.0, {IMAGE}),
    (0.0, 0.0, {NULL}),
    (0.0, 1.5, {NULL, IMAGE}),
    (0.4, 0.7, {NULL, IMAGE, FULL}),
]


def predictions_of_three(count: int) -> torch.Tensor:
    """What a UNet would say of each edit's null, image and full row: ``(count, 3, C, h, w)``."""
    return torch.randn(count, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def three_row_answer(predictions: torch.Tensor, s_t: float, s_i: float) -> torch.Tensor:
    null, image, full = predictions
    return null + s_i * (image - null) + s_t * (full - image)


@pytest.mark.parametrize(("s_t", "s_i", "sees"), SCALES)
def test_rows_of_weight_zero_are_not_run_and_the_answer_is_that_of_three_rows(s_t, s_i, sees):
    rows = needed_rows([s_t], [s_i])
    assert set(rows.sees.tolist()) == sees
    assert len(rows.sees) == len(sees)
    predictions = predictions_of_three(1)
    guided = combine(predictions[0, rows.sees], rows)
    assert torch.allclose(guided[0], three_row_answer(predictions[0], s_t, s_i), atol=1e-5)


def test_edits_of_one_call_keep_their_own_scales_and_rows():
    texts, images = ([s[place] for s in SCALES] for place in (0, 1))
    rows = needed_rows(texts, images)
    assert rows.edit.bincount().tolist() == [len(sees) for _, _, sees in SCALES]
    predictions = predictions_of_three(len(SCALES))
    guided = combine(predictions[rows.edit, rows.sees], rows)
    for place, (s_t, s_i, _) in enumerate(SCALES):
        assert torch.allclose(guided[place], three_row_answer(predictions[place], s_t, s_i), atol=1e-5)


def test_order_of_the_rows_does_not_matter():
    rows = needed_rows([7.5, 3.0], [1.5, 1.0])
    predictions = predictions_of_three(2)[rows.edit, rows.sees]
    shuffled = torch.tensor([4, 1, 0, 3, 2])
    other = rows._replace(edit=rows.edit[shuffled], sees=rows.sees[shuffled])
    assert torch.equal(combine(predictions[shuffled], other), combine(predictions, rows))


def test_scales_that_only_look_equal_in_half_precision_keep_their_row():
    assert set(needed_rows([2.0 + 1e-9], [2.0]).sees.tolist()) == {NULL, IMAGE, FULL}


def test_half_precision_predictions_are_combined_in_single():
    rows = needed_rows([7.5], [1.5])
    predictions = torch.full((3, 4, 2, 2), 1.0, dtype=torch.bfloat16)
    predictions[0] += 0.0078125
    guided = combine(predictions, rows)
    assert guided.dtype == torch.float32
    assert guided[0, 0, 0, 0].item() == pytest.approx(1 - 0.5 * 0.0078125, abs=1e-6)


def test_only_the_full_row_reads_the_instruction():
    rows = needed_rows([7.5, 7.5], [1.5, 1.0])
    states, nulls = torch.full((2, 5, 3), 1.0), torch.zeros(2, 5, 3)
    states[1] = 2.0
    nulls[1] = -2.0  # an edit's own negative text
    assert row_states(rows, states, nulls)[:, 0, 0].tolist() == [0.0, 0.0, 1.0, -2.0, 2.0]


def test_the_null_image_is_zero_whatever_the_image_holds():
    rows = needed_rows([7.5, 7.5], [1.5, 1.0])
    latents = torch.full((2, 4, 2, 2), float("inf"))
    latents[1] = 2.0
    assert row_images(rows, latents)[:, 0, 0, 0].tolist() == [0.0, float("inf"), float("inf"), 2.0, 2.0]
