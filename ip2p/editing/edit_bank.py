"""All edits of one latent size that are under way, and one UNet call that takes any of them one step further.

Every number of an edit lies in a slot of one tensor, so a step is a handful of tensor operations however many edits
share it, and however different their step, steps, sampler, scales and seeds are. Who takes part in a step is for the
engine to say. An edit does not depend on its neighbours, beyond the rounding of batched arithmetic (1/255).
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ip2p.editing.fixed_calls import filled_up
from ip2p.editing.guidance import Rows, combine, row_images, row_states
from ip2p.editing.step_table import StepTable
from ip2p.pairs.sampling import to_denoised


@dataclass(frozen=True)
class EditInputs:
    """What a slot is filled with; tensors on any device."""

    image: torch.Tensor  # (C, h, w) the original image's latent as the UNet sees it
    text: torch.Tensor  # (T, D) the instruction's states
    null: torch.Tensor  # (T, D) the empty (or negative) text's
    noise: torch.Tensor  # (up to N, C, h, w) unit noise: of x_T, then of the steps that draw some
    table: StepTable
    mask: torch.Tensor | None = None  # (1, h, w) in [0, 1], 1 = edit; None: everything
    clean: torch.Tensor | None = None  # (C, h, w) the original image's scaled latent, kept where the mask is 0


class EditBank:
    """Slots for edits of latents ``(C, h, w)`` under one UNet; grows as needed. Not safe for several threads."""

    def __init__(
        self,
        unet: typing.Any,
        scheduler_config: Mapping[str, typing.Any],
        latent_shape: tuple[int, int, int],
        text_shape: tuple[int, int],
        slots: int = 8,
        steps: int = 32,
        call_rows: int | None = None,
    ):
        """``call_rows``: calls of fewer rows are filled up to that number (``ip2p.editing.fixed_calls`` says why)."""
        self.unet, self.shape, self.text_shape, self.call_rows = unet, latent_shape, text_shape, call_rows
        self.prediction_type = str(scheduler_config.get("prediction_type", "epsilon"))
        self.row_evals = 0
        self.free: list[int] = []
        self.rows: dict[int, list[int]] = {}  # by occupied slot: UNet rows of each of its steps
        self.done: dict[int, int] = {}  # by occupied slot: steps done
        self._tensors: dict[str, torch.Tensor] = {}
        self._slots, self._steps = 0, 0
        self._grow(slots, steps)

    def __len__(self) -> int:
        return len(self.done)

    def add(self, inputs: EditInputs) -> int:
        """Take an edit in, at its step 0; the slot it has until ``remove``. Where that fails, no other edit notices."""
        steps = len(inputs.table)
        if not self.free or steps > self._steps:
            self._grow(self._slots if self.free else 2 * self._slots, max(self._steps, steps))
        slot = self.free[-1]
        held, table = self._tensors, inputs.table
        for name, value in (("image", inputs.image), ("text", inputs.text), ("null", inputs.null)):
            held[name][slot] = value.to(held[name].device, held[name].dtype)
        held["noise"][slot, : len(inputs.noise)] = inputs.noise.to(self.unet.device)
        for name in ("timesteps", "coefficients", "weights"):
            held[name][slot, :steps] = getattr(table, name).to(self.unet.device)
        held["sigmas"][slot, : steps + 1] = table.sigmas.to(self.unet.device)
        held["mask"][slot] = 1.0 if inputs.mask is None else inputs.mask.to(self.unet.device)
        held["clean"][slot] = 0.0 if inputs.clean is None else inputs.clean.to(self.unet.device)
        held["latents"][slot] = held["noise"][slot, 0] * held["sigmas"][slot, 0]
        held["before"][slot] = 0.0
        self.rows[slot], self.done[slot] = table.rows, 0
        return self.free.pop()

    def remove(self, slot: int) -> None:
        """Free ``slot``. Asks nothing of the device, which may be lost."""
        del self.rows[slot], self.done[slot]
        self.free.append(slot)

    def latent(self, slot: int) -> torch.Tensor:
        """The slot's latent ``(C, h, w)`` as it is now."""
        return self._tensors["latents"][slot].clone()

    def rows_of(self, slot: int) -> int:
        """UNet rows that the slot's next step takes; 0 where it is finished."""
        done = self.done[slot]
        return self.rows[slot][done] if done < len(self.rows[slot]) else 0

    def left(self, slot: int) -> int:
        """UNet rows that the slot still needs, over all its steps."""
        return sum(self.rows[slot][self.done[slot] :])

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> None:
        """Take each of ``slots`` one step further in one UNet call. Where that fails, nothing has changed."""
        at = torch.from_numpy(np.array(slots, dtype=np.int64)).to(self.unet.device)
        step = torch.tensor([self.done[slot] for slot in slots], device=self.unet.device)
        latents, sigma = self._of("latents", at), self._at("sigmas", at, step)
        denoised = self._denoised(at, step, latents, sigma)
        a, b, c, d = (column.view(-1, 1, 1, 1) for column in self._at("coefficients", at, step).unbind(1))
        # The last step's draw is not there: its d is 0, and any number will do.
        drawn = self._at("noise", at, (step + 1).clamp(max=self._steps - 1))
        moved = a * latents + b * denoised + c * self._of("before", at) + d * drawn
        self._tensors["latents"][at] = self._outside_kept(at, step, moved)
        self._tensors["before"][at] = denoised
        for slot in slots:
            self.done[slot] += 1

    def estimate(self, slot: int) -> torch.Tensor:
        """The last guided estimate of the slot's clean latent ``(C, h, w)``: what a preview shows."""
        return self._tensors["before"][slot].clone()

    def _denoised(
        self, at: torch.Tensor, step: torch.Tensor, latents: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """The guided estimate of x_0 for the slots ``at``."""
        weights = self._at("weights", at, step)
        edit, sees = weights.nonzero(as_tuple=True)
        rows = Rows(edit, sees, weights)
        scaled = (latents / (sigma**2 + 1).sqrt().view(-1, 1, 1, 1)).to(self.unet.dtype)[rows.edit]
        given = torch.cat([scaled, row_images(rows, self._of("image", at))], dim=1)
        states = row_states(rows, self._of("text", at), self._of("null", at))
        times = self._at("timesteps", at, step)[rows.edit]
        self.row_evals += len(given)
        if self.call_rows is not None:
            given, times, states = (filled_up(one, self.call_rows) for one in (given, times, states))
        predictions = self.unet(given, times, encoder_hidden_states=states).sample[: len(rows.edit)]
        return to_denoised(combine(predictions, rows), latents, sigma.view(-1, 1, 1, 1), self.prediction_type)

    def _outside_kept(self, at: torch.Tensor, step: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """Outside of the mask the original image, as noisy as the edit now is (blended latents, Avrahami et al.)."""
        following = self._at("sigmas", at, step + 1).view(-1, 1, 1, 1)
        kept = self._of("clean", at) + following * self._tensors["noise"][at, 0]
        mask = self._of("mask", at)
        return torch.where(mask == 1, moved, mask * moved + (1 - mask) * kept)

    def _of(self, name: str, at: torch.Tensor) -> torch.Tensor:
        return self._tensors[name][at]

    def _at(self, name: str, at: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return self._tensors[name][at, step]

    def _grow(self, slots: int, steps: int) -> None:
        """Make room for ``slots`` edits of up to ``steps`` steps; what there is stays where it is.

        All is made before any of it is put in place: too little memory leaves the bank as it was.
        """
        device, dtype = self.unet.device, self.unet.dtype
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "latents": (self.shape, torch.float32), "before": (self.shape, torch.float32),
            "clean": (self.shape, torch.float32), "mask": ((1, *self.shape[1:]), torch.float32),
            "image": (self.shape, dtype), "text": (self.text_shape, dtype), "null": (self.text_shape, dtype),
            "noise": ((steps, *self.shape), torch.float32), "timesteps": ((steps,), torch.float32),
            "sigmas": ((steps + 1,), torch.float32), "coefficients": ((steps, 4), torch.float32),
            "weights": ((steps, 3), torch.float32),
        }  # fmt: skip
        made = {name: torch.zeros((slots, *shape), dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
        for name, held in self._tensors.items():
            made[name][tuple(slice(size) for size in held.shape)] = held
        self._tensors = made
        self.free += list(range(self._slots, slots))
        self._slots, self._steps = slots, steps
