"""The stage that turns triplets into kept pairs: one row in, one ledger row with its pairs out.

A stage is Ray Data's own callable class, but nothing here knows Ray. What goes into one UNet call is decided by the
prompt and the recipe alone, so that the bytes do not depend on workers, order or retries. The one exception is
memory: where a call does not fit, that prompt goes on with half as many candidates a call, which moves last bits.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ip2p.config import Recipe
from ip2p.errors import DeviceError, RecipeError, StorageError
from ip2p.images import encode_image, square, to_uint8
from ip2p.models.coding import decode_latents, latents_of, pixels_per_latent, scaled, text_state, token_ids
from ip2p.models.components import load_clip, load_text_to_image, resolve_device
from ip2p.models.device_faults import is_device_fault, is_out_of_memory
from ip2p.pairs.alignment import align_tokens
from ip2p.pairs.candidates import draw_candidates
from ip2p.pairs.clip_similarity import ClipSimilarity
from ip2p.pairs.filtering import judge, kept_places
from ip2p.pairs.sampling import PairTexts, SamplerSettings, sample_pairs
from ip2p.pictures import read_picture
from ip2p.schema import Candidate
from ip2p.seeds import stable_id
from ip2p.storage import sha256 as sha256_of

WRITTEN = ("status", "reason", "error", "candidates", "pairs", "row_evals")

Pictures = tuple[np.ndarray, np.ndarray]
"""Original and edited image, ``(H, W, 3)`` uint8."""

Call = tuple[list[Candidate], list[Pictures | None], int]
"""What one UNet batch gave: scored candidates, their pictures (None where not finite), row-evals."""


@dataclass(frozen=True)
class Prompt:
    """What all candidates of a prompt are painted from."""

    caption: str
    edited_caption: str
    texts: PairTexts
    given: np.ndarray | None = None  # the original image where it is not painted,
    latents: torch.Tensor | None = None  # and its latents (1, C, h, w), scaled


@dataclass
class Painted:
    """What is known of a prompt so far: all scores, but only the pictures that can still be kept."""

    candidates: list[Candidate] = field(default_factory=list)
    pictures: dict[int, Pictures] = field(default_factory=dict)  # by place in candidates
    row_evals: int = 0


class PaintPairs:
    """Paints, scores and filters the candidates of each prompt. Loads its models once.

    ``threads`` > 0 sets the torch threads of the process. Raises RecipeError and CheckpointError like the loaders.
    """

    def __init__(self, recipe: Recipe, device: str = "auto", threads: int = 0):
        if threads > 0:
            torch.set_num_threads(threads)
        self.recipe, self.device = recipe, resolve_device(device)
        self.model = load_text_to_image(recipe.models, self.device)
        self.clip = load_clip(recipe.models, self.device)
        self.similarity = ClipSimilarity(self.clip)
        self.settings = SamplerSettings(
            scheduler_config=self.model.scheduler_config,
            steps=recipe.pairs.steps,
            sampler=recipe.pairs.sampler,
            p2p_mode=recipe.pairs.p2p_mode,
            latent_shape=_latent_shape(self.model.vae.config, recipe.pairs.resolution),
            skip=recipe.pairs.skip,
        )
        with torch.inference_mode():
            self.null_state = self._text_state(self._token_ids(""))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Paint a batch of rows.

        Reads prompt_id, caption, edited_caption, status, and picture (its place) where originals are given. Rows whose
        status is set pass through unpainted; the others get status accepted (a pair was kept), exhausted (none was) or
        error (``error`` says why). Adds the columns candidates (list of dicts, fields of schema.Candidate), pairs (list
        of dicts, best first, pictures as encoded bytes) and row_evals. All other columns pass through.
        """
        rows = [{name: column[place] for name, column in batch.items()} for place in range(len(batch["prompt_id"]))]
        painted = [self.paint_row(row) if str(row["status"]) == "" else _unpainted(row) for row in rows]
        names = dict.fromkeys([*batch, *WRITTEN])
        return {name: _column(name, [row[name] for row in painted], batch) for name in names}

    def paint_row(self, row: dict[str, typing.Any]) -> dict[str, typing.Any]:
        """One prompt. A failure that is its own becomes status ``error``.

        A broken device is raised as DeviceError, and a store that is away or refuses everything as StorageError.
        """
        prompt_id, caption, edited_caption = (str(row[name]) for name in ("prompt_id", "caption", "edited_caption"))
        try:
            given = self._given(str(row["picture"])) if self.recipe.pairs.original == "given" else None
            painted = self.paint(prompt_id, caption, edited_caption, given)
            inverted = () if given is None else (sha256_of(given.tobytes()), self.settings.skip)
            pairs = self._pairs((prompt_id, caption, edited_caption, *inverted), painted)
        except Exception as error:
            if isinstance(error, StorageError) and not error.is_of_one_file:
                raise  # the store is at fault, not this prompt
            if is_device_fault(error):
                raise DeviceError(f"{self.device} failed while painting {prompt_id}: {error}") from error
            return {**_unpainted(row), "status": "error", "reason": "", "error": f"{type(error).__name__}: {error}"}
        return {
            **row,
            "status": "accepted" if pairs else "exhausted",
            "reason": "",
            "error": "",
            "candidates": [dataclasses.asdict(candidate) for candidate in painted.candidates],
            "pairs": pairs,
            "row_evals": painted.row_evals,
        }

    @torch.inference_mode()
    def paint(self, prompt_id: str, caption: str, edited_caption: str, given: np.ndarray | None = None) -> Painted:
        """All candidates of a prompt, judged, with the pictures of those that are kept.

        ``given``, uint8 of the recipe's resolution, is the original image of them all; None where it is painted too.
        Raises the out-of-memory error of a call with a single candidate; larger calls are halved. ``row_evals``
        counts the calls that came through.
        """
        drawn = draw_candidates(self.recipe, prompt_id)
        latents = None if given is None else self._latents_of(given)
        prompt = Prompt(caption, edited_caption, self._texts(caption, edited_caption), given, latents)
        painted = Painted()
        per_call = self.recipe.pairs.candidates_per_call
        while len(painted.candidates) < len(drawn):
            place = len(painted.candidates)
            call = drawn[place : place + per_call]
            done = self._paint_call_if_it_fits(prompt, call)
            if done is None:
                per_call = len(call) // 2
            else:
                self._add(painted, *done)
        return painted

    def _add(self, painted: Painted, scored: list[Candidate], pictures: list[Pictures | None], row_evals: int) -> None:
        """Join a call's results. A candidate that is not kept now never will be, so its pictures go."""
        place = len(painted.candidates)
        painted.candidates = judge([*painted.candidates, *scored], self.recipe.filter)
        painted.pictures |= {place + k: pair for k, pair in enumerate(pictures) if pair is not None}
        painted.pictures = {k: painted.pictures[k] for k in kept_places(painted.candidates)}
        painted.row_evals += row_evals

    def _paint_call_if_it_fits(self, prompt: Prompt, call: Sequence[Candidate]) -> Call | None:
        """None where the call ran out of memory and can still be made smaller."""
        try:
            return self._paint_call(prompt, call)
        except (MemoryError, RuntimeError) as error:
            if len(call) == 1 or not is_out_of_memory(error):
                raise
        # The exception, and with it the failed call's tensors, is gone; only now can their memory be given back.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _paint_call(self, prompt: Prompt, call: Sequence[Candidate]) -> Call:
        latents, row_evals = sample_pairs(
            self.model.unet,
            _for_candidates(prompt.texts, len(call)),
            seeds=[candidate.seed for candidate in call],
            p2p_thresholds=[candidate.p2p_threshold for candidate in call],
            guidance_scales=[candidate.guidance_scale for candidate in call],
            settings=self.settings,
            originals=None if prompt.latents is None else prompt.latents.expand(len(call), -1, -1, -1),
        )
        # Pair by pair, so that the decoder's memory (most of it at 512 pixels) does not grow with the call.
        decoded = [self._decoded(pair, prompt.given) for pair in latents]
        scored = [self._scored(*one, prompt.caption, prompt.edited_caption) for one in zip(call, decoded, strict=True)]
        return scored, [_as_pictures(images) for images in decoded], row_evals

    def _given(self, uri: str) -> np.ndarray:
        """The picture at ``uri``, cropped in the middle and brought to the recipe's resolution."""
        return square(read_picture(uri), self.recipe.pairs.resolution)

    def _latents_of(self, picture: np.ndarray) -> torch.Tensor:
        """The mode of one picture's posterior, shifted and scaled as the UNet expects, ``(1, C, h, w)``."""
        return scaled(self.model.vae, latents_of(self.model.vae, [picture]))

    def _decoded(self, pair: torch.Tensor, given: np.ndarray | None) -> torch.Tensor:
        """Both images of a pair; a given one is what it was before the autoencoder saw it."""
        if given is None:
            return self.decode(pair)
        original = torch.from_numpy(np.array(given)).to(pair.device).permute(2, 0, 1)[None] / 255.0
        return torch.cat([original, self.decode(pair[1:])])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``(n, C, h, w)`` to images ``(n, 3, H, W)`` float32 in [0, 1]; NaN and Inf stay what they are."""
        return decode_latents(self.model.vae, latents)

    def _scored(self, candidate: Candidate, images: torch.Tensor, caption: str, edited_caption: str) -> Candidate:
        sims = self.similarity(images[:1], images[1:], caption, edited_caption)
        return dataclasses.replace(
            candidate,
            sim_original=float(sims.original),
            sim_edited=float(sims.edited),
            sim_image=float(sims.image),
            sim_direction=float(sims.direction),
        )

    def _texts(self, caption: str, edited_caption: str) -> PairTexts:
        """The texts of one candidate. Encoded one by one: equal captions get equal bits."""
        ids, edited_ids = self._token_ids(caption), self._token_ids(edited_caption)
        states = torch.stack([self._text_state(ids), self._text_state(edited_ids)])[None]
        eos_id = self.model.tokenizer.eos_token_id
        return PairTexts(states, self.null_state, [align_tokens(ids, edited_ids, eos_id)])

    def _token_ids(self, text: str) -> list[int]:
        return token_ids(self.model.tokenizer, self.model.text_encoder, text)

    def _text_state(self, ids: list[int]) -> torch.Tensor:
        """``(T, D)`` float32: the last hidden states, after the final norm."""
        return text_state(self.model.text_encoder, ids)

    def _pairs(self, identity: tuple[str | float, ...], painted: Painted) -> list[dict[str, typing.Any]]:
        pairs = []
        for rank, place in enumerate(kept_places(painted.candidates)):
            known = dataclasses.asdict(painted.candidates[place])
            del known["reason"]
            original, edited = (
                encode_image(picture, self.recipe.output.image_format) for picture in painted.pictures[place]
            )
            pair_id = self._pair_id(identity, painted.candidates[place])
            pairs.append(
                {"pair_id": pair_id, "rank": rank, **known, "original_image": original, "edited_image": edited}
            )
        return pairs

    def _pair_id(self, identity: tuple[str | float, ...], candidate: Candidate) -> str:
        """The same pictures get the same id on a retry; other texts, weights or settings get another one.

        ``identity``: prompt_id, caption and edited caption, because a prompt_id can stand for the caption alone, and
        where the original image is given, its sum and how many steps were skipped.
        """
        drawn = (candidate.seed, candidate.p2p_threshold, candidate.guidance_scale)
        settings = self.settings
        how = (settings.sampler, settings.steps, settings.p2p_mode, self.recipe.pairs.resolution)
        sha256 = self.model.sha256
        with_what = (sha256["unet"], sha256["vae"], sha256["text_encoder"], self.recipe.models.dtype)
        return stable_id(*identity, *drawn, *how, *with_what)


def _for_candidates(texts: PairTexts, count: int) -> PairTexts:
    alignments = None if texts.alignments is None else list(texts.alignments) * count
    return PairTexts(texts.states.expand(count, -1, -1, -1), texts.null_state, alignments)


def _latent_shape(vae_config: typing.Any, resolution: int) -> tuple[int, int, int]:
    factor = pixels_per_latent(vae_config)
    if resolution % factor:
        raise RecipeError(f"pairs.resolution {resolution} is not a multiple of {factor}, the VAE's pixels per latent")
    return (vae_config.latent_channels, resolution // factor, resolution // factor)


def _as_pictures(images: torch.Tensor) -> Pictures | None:
    if not bool(images.isfinite().all()):
        return None
    original, edited = to_uint8(images.permute(0, 2, 3, 1).cpu().numpy())
    return original, edited


def _unpainted(row: dict[str, typing.Any]) -> dict[str, typing.Any]:
    return {"reason": "", "error": "", **row, "candidates": [], "pairs": [], "row_evals": 0}


def _column(name: str, values: list[typing.Any], batch: dict[str, np.ndarray]) -> np.ndarray:
    if name not in WRITTEN:
        return batch[name]
    if name == "row_evals":
        return np.asarray(values, np.int64)
    # Filled one by one: from a list of lists numpy would make a matrix, and from texts a column of fixed width.
    column = np.empty(len(values), object)
    for place, value in enumerate(values):
        column[place] = value
    return column
