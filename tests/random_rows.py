"""A source of random pairs, for what does not depend on where pairs come from; other processes can be sent one."""

from __future__ import annotations

import numpy as np
import torch

from ip2p.training.pair_columns import PairColumns


class RandomRows:
    """Columns of ``pairs`` pairs, the same each time."""

    latent_shape = (4, 8, 8)

    def __init__(self, pairs: int = 12, tokens: int = 5):
        random = torch.Generator().manual_seed(5)
        pictures = torch.randn((3, pairs, *self.latent_shape), generator=random)
        self.columns = (pictures[0], pictures[1].abs() * 0.1, pictures[2])
        self.states = torch.randn((pairs, tokens, 32), generator=random)
        self.null_state = torch.randn((tokens, 32), generator=random)

    def __len__(self) -> int:
        return len(self.states)

    def rows(self, indices: np.ndarray, flips: np.ndarray) -> PairColumns:
        turned = torch.from_numpy(flips)[:, None, None, None]
        pictures = (torch.where(turned, column[indices].flip(-1), column[indices]) for column in self.columns)
        return PairColumns(*pictures, self.states[indices])
