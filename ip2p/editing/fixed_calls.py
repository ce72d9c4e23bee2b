"""UNet calls of one size, so that an edit has the same bytes whoever shares its calls.

Batched arithmetic rounds by the shape of a call: a row may come out different in its last bits in a call of 3 rows and
in one of 24. In calls of equal shape it does not, wherever in the call it stands and whatever the others are: matrix
products and convolutions take each row through the same operations. That holds for most sizes of a call, not for
all, so it is looked at (``check_fixed_calls``) before bytes are promised.
"""

from __future__ import annotations

import torch

from ip2p.errors import InputError
from ip2p.models.components import EditModel

TRIALS = 3


def filled_up(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``(n, ...)`` to ``(count, ...)`` by repeating the first row; as it is where n is not below ``count``."""
    missing = count - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])])


@torch.inference_mode()
def check_fixed_calls(model: EditModel, latent_shape: tuple[int, int, int], call_rows: int) -> None:
    """Raise InputError where a row's answer in a call of ``call_rows`` rows depends on its place or its neighbours."""
    unet, channels = model.unet, latent_shape[0]
    generator = torch.Generator().manual_seed(0)
    window = model.text_encoder.config.max_position_embeddings
    shapes = ((2 * channels, *latent_shape[1:]), (window, unet.config.cross_attention_dim))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn((2 * call_rows, *shape), generator=generator).to(unet.device, unet.dtype)

    samples, states = (drawn(*shape) for shape in shapes)
    times = torch.arange(2 * call_rows, device=unet.device, dtype=torch.float32) * (999 / (2 * call_rows))

    def answers(rows: torch.Tensor) -> torch.Tensor:
        here = rows.to(unet.device)
        return torch.as_tensor(unet(samples[here], times[here], encoder_hidden_states=states[here]).sample)

    alone = answers(torch.arange(call_rows))
    for _ in range(TRIALS):
        order = torch.randperm(2 * call_rows, generator=generator)[:call_rows]
        again = answers(order)
        known = order < call_rows
        if not torch.equal(again[known.to(unet.device)], alone[order[known].to(unet.device)]):
            raise InputError(
                f"calls of {call_rows} rows: on {unet.device} a row's last bits depend on the rows beside it, so two "
                "runs would differ in bytes; choose another number of rows a call (multiples of 8 mostly work)"
            )
