"""Recipe and Placement. A Recipe decides *what* comes out; a Placement only *how fast*.

Two placements of one recipe give the same rows. A recipe is a function that returns one whole frozen object;
overrides name a field that exists (``pairs.candidates=16``) or fail with the list of those that do.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field

from ip2p.errors import RecipeError

R = typing.TypeVar("R")

EMBEDDED = "embedded"
"""Model id of the postcard family that ships inside the package."""


@dataclass(frozen=True)
class Models:
    """Which weights. Each is ``embedded``, or a folder (diffusers / transformers / open_clip layout)."""

    text_to_image: str = EMBEDDED  # diffusers folder: unet, vae, text_encoder, tokenizer, scheduler
    clip: str = EMBEDDED  # open_clip model name, or a folder with open_clip_config.json
    clip_pretrained: str = ""  # open_clip pretrained tag or weights file, when clip is a model name
    triplet_lm: str = EMBEDDED  # transformers causal LM folder
    dtype: str = "float32"  # float32 | bfloat16 | float16, of the UNet; scores are float32


@dataclass(frozen=True)
class Triplets:
    """How captions become triplets (original: davinci, temperature 0.7, 256 tokens, 1 + 3 tries)."""

    writer: str = "lm"  # lm | http | given (the input already holds triplets)
    temperature: float = 0.7  # 0 = greedy
    top_p: float = 1.0  # 0..1
    max_tokens: int = 256  # new tokens per completion
    tries: int = 4  # completions asked per caption before it is refused
    frequency_penalty: float = 0.1  # HTTP writer only
    presence_penalty: float = 0.0  # HTTP writer only
    http_url: str = ""  # base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1
    http_model: str = ""  # model name sent to it
    text_window: int = 77  # tokens of the text encoder; longer texts are refused


@dataclass(frozen=True)
class Pairs:
    """How a triplet becomes candidates (original: 100 candidates, 100 steps, p ~ U(0.1, 0.9), cfg ~ U(7.5, 15))."""

    candidates: int = 100  # per prompt
    candidates_per_call: int = 1  # painted in one UNet batch; decided by the recipe, so bytes never depend on workers
    steps: int = 100
    sampler: str = "euler_ancestral"  # euler_ancestral | dpmpp_2m
    p2p_mode: str = "self"  # self (released code) | cross (paper) | off
    original: str = "painted"  # painted | given: the picture at the caption's url, by edit-friendly inversion
    skip: float = 0.0  # share of the steps, noisiest first, not taken to edit a given original (its authors: 0.36)
    p2p_min: float = 0.1
    p2p_max: float = 0.9
    guidance_min: float = 7.5
    guidance_max: float = 15.0
    resolution: int = 512  # pixels, square


@dataclass(frozen=True)
class Filter:
    """Which candidates are kept (original, for ViT-L/14: 0.2, 0.2, 0.7, 0.2 and at most 4)."""

    min_original: float = 0.2
    min_edited: float = 0.2
    min_image: float = 0.7
    min_direction: float = 0.2
    max_kept: int = 4


@dataclass(frozen=True)
class Output:
    """How results are stored. One shard is the unit of commit: it appears whole or not at all."""

    prompts_per_shard: int = 4  # worked on together; near-duplicate instructions are looked for among them
    image_format: str = "png"  # png | jpeg (quality 95, 4:4:4)


@dataclass(frozen=True)
class Recipe:
    """All that decides what a datagen run makes. Written as ``recipe.json`` beside its output."""

    name: str
    seed: int = 0
    models: Models = field(default_factory=Models)
    triplets: Triplets = field(default_factory=Triplets)
    pairs: Pairs = field(default_factory=Pairs)
    filter: Filter = field(default_factory=Filter)
    output: Output = field(default_factory=Output)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Placement:
    """How fast: pools and devices. Never changes a byte of the result."""

    lm_actors: tuple[int, int] = (1, 1)  # min, max
    painter_actors: tuple[int, int] = (1, 1)  # min, max
    lm_gpus: float = 0.0  # GPUs per LM actor; fractions share one
    painter_gpus: float = 0.0  # GPUs per painter actor
    lm_cpus: float = 0.25
    painter_cpus: float = 1.0
    threads: int = 0  # torch threads per painter; 0 = leave as it is

    def pools(self) -> str:
        """The pools in words, for people."""
        painters, writers = ("{}:{}".format(*size) for size in (self.painter_actors, self.lm_actors))
        painter_share, writer_share = (
            f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU"
            for gpus, cpus in ((self.painter_gpus, self.painter_cpus), (self.lm_gpus, self.lm_cpus))
        )
        return f"painters {painters} of {painter_share} each, writers {writers} of {writer_share} each"


def postcard() -> Recipe:
    """The embedded family on 64-pixel postcards: minutes on two CPU cores.

    Its CLIP scores higher than ViT-L/14, so the filter has thresholds of its own (bench/postcard_pairs.py --calibrate).
    """
    return Recipe(
        name="postcard",
        triplets=Triplets(max_tokens=96, text_window=77),
        pairs=Pairs(
            candidates=8, candidates_per_call=8, steps=12, p2p_mode="cross", guidance_min=2.0, guidance_max=4.0,
            resolution=64,
        ),
        filter=Filter(min_original=0.9, min_edited=0.8, min_image=0.64, min_direction=0.88),
        output=Output(prompts_per_shard=4),
    )  # fmt: skip


def postcard_corpus() -> Recipe:
    """The pairs that the shipped edit model learns from: edits of drawings that are given.

    The first seven of twelve steps are not taken: they would move what the edit should leave in its place. One
    candidate of many prompts, and a filter that lets most of them through: one that keeps the surest half keeps easy
    pictures, and an edit model learns nothing of the others (docs/measurements.md, "Sixth edition").
    """
    recipe = postcard()
    return dataclasses.replace(
        recipe,
        name="postcard-corpus",
        pairs=dataclasses.replace(
            recipe.pairs, candidates=1, candidates_per_call=1, guidance_min=1.5, guidance_max=2.0, p2p_min=0.5,
            original="given", skip=7 / 12,
        ),
        filter=Filter(min_original=0.8, min_edited=0.82, min_image=0.5, min_direction=0.5, max_kept=1),
    )  # fmt: skip


def sd15() -> Recipe:
    """Stable-Diffusion-1.5-class weights, with the released code's values. Set ``models.text_to_image=DIR``."""
    return Recipe(
        name="sd15",
        models=Models(text_to_image="", clip="ViT-L-14-quickgelu", clip_pretrained="openai", triplet_lm=""),
        output=Output(prompts_per_shard=8),
    )


RECIPES = {"postcard": postcard, "postcard-corpus": postcard_corpus, "sd15": sd15}


def load_recipe(name: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe ``name`` with ``section.field=value`` overrides applied in order.

    Raises RecipeError for an unknown recipe, an unknown field (the message lists the known ones) or a bad value.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; known: {', '.join(sorted(RECIPES))}")
    recipe = overridden(RECIPES[name](), overrides)
    check_recipe(recipe)
    return recipe


def overridden(recipe: R, overrides: typing.Sequence[str]) -> R:
    """``recipe`` (any frozen dataclass of one or two levels) with ``section.field=value`` applied in order.

    Raises RecipeError for an unknown field (the message lists the known ones) or a value of another type.
    """
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set wants section.field=value, got {override!r}")
        recipe = _replaced(recipe, path.strip(), value.strip())
    return recipe


def recipe_from_json(text: str) -> Recipe:
    """Read back what ``Recipe.to_json`` wrote; raises RecipeError on a field this version does not know."""
    values = json.loads(text)
    sections = {"models": Models, "triplets": Triplets, "pairs": Pairs, "filter": Filter, "output": Output}
    try:
        parts = {name: kind(**values.pop(name)) for name, kind in sections.items()}
        return Recipe(**values, **parts)
    except (TypeError, KeyError) as error:
        raise RecipeError(f"recipe.json was written by another version: {error}") from error


def known_fields(recipe: typing.Any) -> list[str]:
    """Every path that ``--set`` takes, as ``section.field``."""
    paths = []
    for top in dataclasses.fields(recipe):
        value = getattr(recipe, top.name)
        if dataclasses.is_dataclass(value):
            paths += [f"{top.name}.{inner.name}" for inner in dataclasses.fields(value)]
        elif top.name != "name":
            paths.append(top.name)
    return paths


def _replaced(recipe: R, path: str, text: str) -> R:
    if path not in known_fields(recipe):
        raise RecipeError(f"unknown recipe field {path!r}; known: {', '.join(known_fields(recipe))}")
    section, _, name = path.rpartition(".")
    whole: typing.Any = recipe
    owner: typing.Any = getattr(recipe, section) if section else recipe
    changed = dataclasses.replace(owner, **{name: _parsed(path, text, getattr(owner, name))})
    return typing.cast(R, dataclasses.replace(whole, **{section: changed}) if section else changed)


def _parsed(path: str, text: str, old: object) -> typing.Any:
    kind: typing.Any = type(old)
    try:
        return kind(text)  # bool fields do not exist; str, int and float parse themselves
    except ValueError as error:
        raise RecipeError(f"{path} wants {kind.__name__}, got {text!r}") from error


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError where a value cannot work, before anything is loaded."""
    pairs, texts = recipe.pairs, recipe.triplets
    rules = (
        (pairs.steps >= 2, "pairs.steps must be at least 2 (the sharing window is i / (steps - 1))"),
        (pairs.candidates >= 1, "pairs.candidates must be at least 1"),
        (pairs.candidates_per_call >= 1, "pairs.candidates_per_call must be at least 1"),
        (pairs.sampler in ("euler_ancestral", "dpmpp_2m"), "pairs.sampler is euler_ancestral or dpmpp_2m"),
        (pairs.p2p_mode in ("self", "cross", "off"), "pairs.p2p_mode is self, cross or off"),
        (pairs.original in ("painted", "given"), "pairs.original is painted or given"),
        (
            pairs.skip >= 0 and round(pairs.skip * pairs.steps) < pairs.steps,
            "pairs.skip is a share of the steps, 0..1, that leaves at least one of them",
        ),
        (pairs.original == "given" or not pairs.skip, "pairs.skip is for pairs.original=given; set pairs.skip=0"),
        (
            pairs.original == "painted" or pairs.sampler == "euler_ancestral",
            "pairs.original=given goes the steps of pairs.sampler=euler_ancestral",
        ),
        (0 <= pairs.p2p_min <= pairs.p2p_max <= 1, "pairs.p2p_min and p2p_max lie in 0..1, min first"),
        (0 <= pairs.guidance_min <= pairs.guidance_max, "pairs.guidance_min and guidance_max are >= 0, min first"),
        (pairs.resolution > 0 and pairs.resolution % 8 == 0, "pairs.resolution is a multiple of 8 pixels"),
        (texts.writer in ("lm", "http", "given"), "triplets.writer is lm, http or given"),
        (texts.tries >= 1, "triplets.tries must be at least 1"),
        (texts.temperature >= 0, "triplets.temperature must be >= 0"),
        (recipe.filter.max_kept >= 1, "filter.max_kept must be at least 1"),
        (recipe.output.prompts_per_shard >= 1, "output.prompts_per_shard must be at least 1"),
        (recipe.output.image_format in ("png", "jpeg"), "output.image_format is png or jpeg"),
        (recipe.models.dtype in ("float32", "bfloat16", "float16"), "models.dtype is float32, bfloat16 or float16"),
    )
    for holds, message in rules:
        if not holds:
            raise RecipeError(message)
