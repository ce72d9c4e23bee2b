"""Prompt-to-Prompt on fused attention: the edited picture attends as the original does, and no map is ever built.

Two modes, chosen by name (InstructPix2Pix, section 3.1.2; Hertz et al. 2022, section 3):

* ``self``, what the released code does: in every self-attention, at every resolution, an edited row uses the queries
  and keys of its original row and its own values. Copying q and k is copying the logits ``q k^T``.
* ``cross``, what both papers describe: in every cross-attention an edited row uses its original row's weights A_o with
  its own values v_e. With the captions aligned by ``share`` and ``own`` (see ``ip2p.pairs.alignment``) the output is
  ``sum_i (sum_j share[i, j] A_o[:, j] + own[i] A_e[:, i]) v_e[i]``, which is linear in v and so equals
  ``SDPA(q_o, k_o, share^T v_e) + SDPA(q_e, k_e, own * v_e)``.

Each row says for itself whether it shares and with which row, so one batch holds many pairs with different p. When the
window closes is for the sampler to say. Attention masks are not supported: captions fill the whole window.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MODES = ("self", "cross", "off")


@dataclass(frozen=True)
class SharedRows:
    """Who attends like whom in one UNet call of R rows. Held only while at least one row shares.

    ``source`` (R,) long: the row whose attention is used, itself where a row does not share. ``sharing`` (S,) long:
    the rows that do. ``share`` (S, T, T): their alignments. ``owning`` (O,) long: those of them with tokens of their
    own, and ``own`` (O, T) which tokens these are.
    """

    source: torch.Tensor
    sharing: torch.Tensor
    share: torch.Tensor | None = None
    owning: torch.Tensor | None = None
    own: torch.Tensor | None = None


class PromptToPrompt:
    """Ties rows of a diffusers UNet together while ``installed``; outside of it the UNet is untouched."""

    def __init__(self, unet: typing.Any, mode: str):
        if mode not in MODES:
            raise ValueError(f"unknown Prompt-to-Prompt mode {mode!r}; known: {', '.join(MODES)}")
        self.unet, self.mode = unet, mode
        self.rows: SharedRows | None = None

    def set_rows(
        self,
        sharing: torch.Tensor,
        source: torch.Tensor,
        share: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> None:
        """Say for the next UNet calls which of their R rows share (``sharing`` (R,) bool) and with whom (``source``).

        ``cross`` also needs the alignments of all rows, ``share`` (R, T, T) and ``own`` (R, T); what they hold for
        rows that do not share is not read. Where no row shares the UNet runs as if nothing were installed.
        """
        sharing = sharing.cpu()
        if self.mode == "off" or not bool(sharing.any()):
            self.rows = None
            return
        device = self.unet.device
        itself = torch.arange(len(sharing))
        tied = SharedRows(torch.where(sharing, source.cpu(), itself).to(device), itself[sharing].to(device))
        self.rows = tied if self.mode == "self" else _with_alignment(tied, sharing, share, own)

    @contextmanager
    def installed(self) -> Iterator[PromptToPrompt]:
        """Put this object's attention into the UNet and give the UNet its own back at the end."""
        if self.mode == "off":
            yield self
            return
        before = dict(self.unet.attn_processors)
        self.unet.set_attn_processor({name: self._processor(name, plain) for name, plain in before.items()})
        try:
            yield self
        finally:
            self.rows = None
            self.unet.set_attn_processor(before)

    def _processor(self, name: str, plain: Callable) -> Callable:
        """What layer ``name`` runs: ``plain``, its own processor, unless the layer is one that this mode ties."""
        is_cross = self.unet.get_submodule(name.removesuffix(".processor")).is_cross_attention
        if is_cross != (self.mode == "cross"):
            return plain
        return TiedAttention(self, plain, cross_attention if is_cross else self_attention)


@dataclass
class TiedAttention:
    """A diffusers attention processor: ``plain`` where no row shares, else the same layer with ``attend`` inside."""

    control: PromptToPrompt
    plain: Callable
    attend: Callable[[SharedRows, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(
        self,
        attn: typing.Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = self.control.rows
        if rows is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None or attn.spatial_norm is not None:
            raise ValueError("Prompt-to-Prompt supports neither attention masks nor spatially normalised attention")
        tokens = _as_tokens(attn, hidden_states)
        query, key, value = _projected(attn, tokens, encoder_hidden_states)
        mixed = self.attend(rows, query, key, value)
        return _as_output(attn, mixed.transpose(1, 2).flatten(2), hidden_states)


def self_attention(rows: SharedRows, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention ``(R, heads, N, d)`` with each row's q and k taken from its source row."""
    return F.scaled_dot_product_attention(query[rows.source], key[rows.source], value)


def cross_attention(rows: SharedRows, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of ``(R, heads, N, d)`` on T text tokens, tied rows mapped by their alignment."""
    assert rows.share is not None
    mapped = torch.einsum("sij,shid->shjd", rows.share.to(value.dtype), value[rows.sharing])
    values = value.index_copy(0, rows.sharing, mapped)
    mixed = F.scaled_dot_product_attention(query[rows.source], key[rows.source], values)
    if rows.owning is None or rows.own is None:
        return mixed
    own_values = value[rows.owning] * rows.own[:, None, :, None].to(value.dtype)
    own = F.scaled_dot_product_attention(query[rows.owning], key[rows.owning], own_values)
    return mixed.index_add(0, rows.owning, own)


def _with_alignment(
    tied: SharedRows, sharing: torch.Tensor, share: torch.Tensor | None, own: torch.Tensor | None
) -> SharedRows:
    if share is None or own is None:
        raise ValueError("Prompt-to-Prompt mode 'cross' needs the alignment: share (R, T, T) and own (R, T)")
    device, own = tied.source.device, own.cpu()
    owning = (sharing & (own != 0).any(dim=1)).nonzero().flatten()
    return SharedRows(
        source=tied.source,
        sharing=tied.sharing,
        share=share.to(device)[tied.sharing],
        owning=owning.to(device) if len(owning) else None,
        own=own[owning].to(device) if len(owning) else None,
    )


def _as_tokens(attn: typing.Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """``(R, C, h, w)`` or ``(R, N, C)`` to normalised ``(R, N, C)``."""
    tokens = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
    if attn.group_norm is not None:
        tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    return tokens


def _projected(
    attn: typing.Any, tokens: torch.Tensor, context: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, each ``(R, heads, N or T, d)``."""
    if context is None:
        context = tokens
    elif attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    projections = (attn.to_q(tokens), attn.to_k(context), attn.to_v(context))
    query, key, value = (states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in projections)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def _as_output(attn: typing.Any, mixed: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The layer's output projection, residual and scale on ``(R, N, C)``, in the shape of its input."""
    output = attn.to_out[1](attn.to_out[0](mixed))
    if hidden_states.ndim == 4:
        output = output.transpose(1, 2).reshape(hidden_states.shape)
    if attn.residual_connection:
        output = output + hidden_states
    return output / attn.rescale_output_factor
