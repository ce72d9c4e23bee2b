"""Which token of the edited caption attends like which token of the caption (Prompt-to-Prompt, section 3.2).

The paper swaps words and refines phrases; captions that a language model wrote do both at once and differ in length.
So the two token sequences are compared as texts are: what is unchanged maps one to one, what was replaced takes over
the attention of what it replaces, and what was inserted keeps its own. Plain numbers; no tensors, no models.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Alignment(NamedTuple):
    """Edited token i attends with ``sum_j share[i, j] * A_original[:, j] + own[i] * A_edited[:, i]``.

    ``share`` is ``(T_edited, T_original)``, ``own`` is ``(T_edited,)``, both float32. A row of ``share`` is all zero
    exactly where ``own`` is 1. Columns sum to 1, or to 0 where the caption's token has no counterpart.
    """

    share: np.ndarray
    own: np.ndarray


def align_tokens(original_ids: Sequence[int], edited_ids: Sequence[int], eos_id: int) -> Alignment:
    """Align two padded id sequences ``[BOS] tokens [EOS] padding``; the first ``eos_id`` ends the tokens.

    A replaced span of another length is spread evenly: each token of it gets an equal part of every replaced one's
    attention.
    """
    original, edited = list(original_ids), list(edited_ids)
    end_original, end_edited = _end(original, eos_id), _end(edited, eos_id)
    share = np.zeros((len(edited), len(original)), np.float32)
    matcher = difflib.SequenceMatcher(None, original[:end_original], edited[:end_edited], autojunk=False)
    for kind, o1, o2, e1, e2 in matcher.get_opcodes():
        if kind in ("equal", "replace"):
            _map_span(share, o1, o2, e1, e2)
    # EOS and padding carry much of CLIP's attention, so they are tied as far as both captions have them.
    tail = min(len(original) - end_original, len(edited) - end_edited)
    _map_span(share, end_original, end_original + tail, end_edited, end_edited + tail)
    own = (share.sum(axis=1) == 0).astype(np.float32)
    return Alignment(share, own)


def _end(ids: list[int], eos_id: int) -> int:
    return ids.index(eos_id) if eos_id in ids else len(ids)


def _map_span(share: np.ndarray, o1: int, o2: int, e1: int, e2: int) -> None:
    if o2 - o1 == e2 - e1:
        share[np.arange(e1, e2), np.arange(o1, o2)] = 1.0
    else:
        share[e1:e2, o1:o2] = 1.0 / (e2 - e1)
