"""Both modes against literal restatements that build the attention maps, on a UNet of the real class at tiny size."""

from __future__ import annotations

import pytest
import torch
from tiny_family import TEXT_WIDTH, tiny_unet

from ip2p.pairs.alignment import align_tokens
from ip2p.pairs.prompt_to_prompt import PromptToPrompt

WINDOW, BOS, EOS = 12, 50, 51
UNET = tiny_unet()


class ExplicitMaps:
    """Attention as written in the papers: maps are built, changed by ``change(logits, map)``, and applied."""

    def __init__(self, cross: bool, change):
        self.cross, self.change = cross, change

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = [
            torch.stack(states.chunk(attn.heads, dim=-1), dim=1)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        ]
        query, key, value = split
        logits = torch.einsum("rhnd,rhtd->rhnt", query, key) * query.shape[-1] ** -0.5
        maps = logits.softmax(dim=-1)
        if self.cross == (encoder_hidden_states is not None):
            maps = self.change(logits, maps)
        mixed = torch.einsum("rhnt,rhtd->rhnd", maps, value)
        return attn.to_out[0](torch.cat(mixed.unbind(dim=1), dim=-1))


def explicit(cross: bool, change, latents: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    unet = tiny_unet()
    unet.set_attn_processor(ExplicitMaps(cross, change))
    return unet(latents, torch.tensor(500.0), encoder_hidden_states=states).sample


def tied(mode: str, latents: torch.Tensor, states: torch.Tensor, **rows: torch.Tensor) -> torch.Tensor:
    control = PromptToPrompt(UNET, mode)
    with control.installed():
        control.set_rows(**rows)
        return UNET(latents, torch.tensor(500.0), encoder_hidden_states=states).sample


def plain(latents: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return UNET(latents, torch.tensor(500.0), encoder_hidden_states=states).sample


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Six rows: three originals, then their three edited rows; as large as latents are late in sampling."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(6, 4, 8, 8, generator=generator)
    return latents, torch.randn(6, WINDOW, TEXT_WIDTH, generator=generator)


SOURCE = torch.tensor([0, 1, 2, 0, 1, 2])
SHARING = torch.tensor([False, False, False, True, False, True])


def padded(tokens: list[int]) -> list[int]:
    return [BOS, *tokens] + [EOS] * (WINDOW - 1 - len(tokens))


def alignments() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 3 and 5 share: an insertion with a swap, and a shorter caption with a swap of another length."""
    changes = [([1, 2, 3], [1, 7, 3, 8, 9]), ([1, 2], [3]), ([1, 2, 3, 4, 5], [1, 6, 5])]
    aligned = [align_tokens(padded(a), padded(b), EOS) for a, b in changes]
    share = torch.stack([torch.from_numpy(one.share) for one in aligned])
    own = torch.stack([torch.from_numpy(one.own) for one in aligned])
    return torch.cat([torch.eye(WINDOW).expand(3, -1, -1), share]), torch.cat([torch.zeros(3, WINDOW), own])


def test_self_mode_equals_copying_the_logits_of_every_self_attention(batch) -> None:
    def copy_logits(logits, maps):
        copied = logits.clone()
        copied[3], copied[5] = logits[0], logits[2]
        return copied.softmax(dim=-1)

    expected = explicit(False, copy_logits, *batch)
    found = tied("self", *batch, sharing=SHARING, source=SOURCE)
    assert (found - expected).abs().max() < 1e-5
    assert (found - plain(*batch))[[3, 5]].abs().amax(dim=(1, 2, 3)).min() > 1e-2  # and it does change the picture


def test_cross_mode_equals_mapped_maps_for_swaps_insertions_and_deletions(batch) -> None:
    share, own = alignments()

    def map_columns(logits, maps):
        changed = maps.clone()
        for row, original in ((3, 0), (5, 2)):
            for token in range(WINDOW):
                borrowed = (maps[original] * share[row, token]).sum(dim=-1)
                changed[row, :, :, token] = borrowed + own[row, token] * maps[row, :, :, token]
        return changed

    assert own[3].any()
    assert own[5].any()
    expected = explicit(True, map_columns, *batch)
    found = tied("cross", *batch, sharing=SHARING, source=SOURCE, share=share, own=own)
    assert (found - expected).abs().max() < 1e-5
    assert (found - plain(*batch))[[3, 5]].abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_cross_mode_without_tokens_of_their_own_equals_the_originals_maps(batch) -> None:
    def copy_maps(logits, maps):
        changed = maps.clone()
        changed[3], changed[5] = maps[0], maps[2]
        return changed

    share, own = torch.eye(WINDOW).expand(6, -1, -1), torch.zeros(6, WINDOW)
    found = tied("cross", *batch, sharing=SHARING, source=SOURCE, share=share, own=own)
    assert (found - explicit(True, copy_maps, *batch)).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["self", "cross"])
def test_rows_that_do_not_share_are_those_of_the_plain_unet(batch, mode: str) -> None:
    share, own = alignments()
    found = tied(mode, *batch, sharing=SHARING, source=SOURCE, share=share, own=own)
    assert (found - plain(*batch))[[0, 1, 2, 4]].abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["self", "cross", "off"])
def test_where_no_row_shares_the_unet_runs_as_if_nothing_were_installed(batch, mode: str) -> None:
    share, own = alignments()
    found = tied(mode, *batch, sharing=torch.zeros(6, dtype=torch.bool), source=SOURCE, share=share, own=own)
    assert torch.equal(found, plain(*batch))


def test_off_mode_never_shares(batch) -> None:
    assert torch.equal(tied("off", *batch, sharing=SHARING, source=SOURCE), plain(*batch))


@pytest.mark.parametrize("mode", ["self", "cross"])
def test_every_attention_of_the_mode_is_tied_at_every_resolution_and_no_other(mode: str) -> None:
    layer = {"self": "attn1", "cross": "attn2"}[mode]
    before = dict(UNET.attn_processors)
    control = PromptToPrompt(UNET, mode)
    with control.installed():
        changed = {name for name, processor in UNET.attn_processors.items() if processor is not before[name]}
    assert changed == {name for name in before if layer in name}
    assert {name.split(".")[0] for name in changed} == {"down_blocks", "mid_block", "up_blocks"}


def test_the_unet_gets_its_own_attention_back_even_after_an_error(batch) -> None:
    before = dict(UNET.attn_processors)
    control = PromptToPrompt(UNET, "self")

    def fail_while_installed() -> None:
        with control.installed():
            control.set_rows(SHARING, SOURCE)
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_while_installed()
    assert all(UNET.attn_processors[name] is processor for name, processor in before.items())
    assert control.rows is None


def test_attention_with_its_own_norm_residual_and_scale_runs_as_diffusers_runs_it() -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn = Attention(
        16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, rescale_output_factor=1.5,
        qk_norm="layer_norm", bias=True, _from_deprecated_attn_block=True,
    )  # fmt: skip
    hidden_states = torch.randn(2, 16, 3, 3)
    expected = attn(hidden_states)
    control = PromptToPrompt(UNET, "self")
    control.set_rows(torch.tensor([False, True]), torch.tensor([0, 1]))
    attn.set_processor(control._processor("mid_block.attentions.0.transformer_blocks.0.attn1", attn.processor))
    assert (attn(hidden_states) - expected).abs().max() < 1e-6


def test_mode_attention_masks_and_missing_alignments_are_refused() -> None:
    with pytest.raises(ValueError, match="known: self, cross, off"):
        PromptToPrompt(UNET, "both")
    with pytest.raises(ValueError, match="needs the alignment"):
        PromptToPrompt(UNET, "cross").set_rows(SHARING, SOURCE)
    control = PromptToPrompt(UNET, "self")
    latents, states = torch.zeros(2, 4, 8, 8), torch.zeros(2, WINDOW, TEXT_WIDTH)
    control.set_rows(torch.tensor([False, True]), torch.tensor([0, 0]))
    with control.installed(), pytest.raises(ValueError, match="attention masks"):
        UNET(latents, 1, encoder_hidden_states=states, attention_mask=torch.ones(2, 64))
