from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ip2p.training import averaging


def test_gradients_become_the_mean_of_all_workers_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real group of one; the other worker, whose gradients are three times as large, is added to its sums."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        reduce, sent = dist.all_reduce, []

        def with_another(flat: torch.Tensor) -> None:
            reduce(flat)
            sent.append(flat.numel())
            flat *= 4

        monkeypatch.setattr(dist, "all_reduce", with_another)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(averaging, "BUCKET_BYTES", 40)
        gradients = [torch.ones(2, 3), torch.full((4,), 2.0), torch.full((20,), 3.0), torch.tensor(5.0)]
        gradients[0] = gradients[0].t()  # not contiguous, as weights in channels_last are
        averaging.mean_over_workers(gradients)
    finally:
        dist.destroy_process_group()
    assert sent == [10, 20, 1]
    assert [gradient.unique().tolist() for gradient in gradients] == [[2.0], [4.0], [6.0], [10.0]]
    assert gradients[0].shape == (3, 2)
