"""How people speak of postcards: captions, and instructions for every exact edit.

A caption names all attributes and nothing of the layout. The same seed gives the same words. ``EditOf`` says in data
what an instruction says in words, so that the truth of every edit can be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ip2p.postcards.scene import COLOURS, EXTRAS, GROUNDS, OBJECTS, SKIES, STYLES, Scene

TASKS = ("add", "remove", "replace", "colour", "ground", "sky", "season", "style", "two")

_STYLE_PHRASES = {
    "photo": ("a photo of {}", "a photograph of {}", "{}", "a snapshot of {}"),
    "pencil": ("a pencil sketch of {}", "a pencil drawing of {}", "{}, pencil sketch"),
    "watercolour": ("a watercolour of {}", "a watercolour painting of {}", "{}, watercolour"),
    "pixel": ("pixel art of {}", "{}, pixel art", "an 8-bit pixel picture of {}"),
    "comic": ("a comic panel of {}", "{}, comic book style", "a comic drawing of {}"),
}
_GROUND_PHRASES = {
    "grass": ("on green grass", "on a meadow", "in a grassy field"),
    "sand": ("on sand", "in the desert", "on a sandy beach"),
    "snow": ("on snow", "in the snow", "on a snowy field"),
    "water": ("on the water", "on a lake", "on the sea"),
    "leaves": ("on autumn leaves", "among fallen leaves", "on a carpet of autumn leaves"),
}
_SKY_PHRASES = {
    "day": ("under a blue sky", "on a sunny day", "by day"),
    "sunset": ("at sunset", "under an orange sunset sky", "in the evening sun"),
    "night": ("at night", "under a starry night sky", "in the dark of night"),
    "overcast": ("under a grey sky", "on a cloudy day", "under an overcast sky"),
    "dawn": ("at dawn", "under a pink dawn sky", "at daybreak"),
}
_EXTRA_PHRASES = {
    "moon": ("a full moon", "the moon", "a moon"),
    "rainbow": ("a rainbow", "a bright rainbow"),
    "birds": ("birds", "birds in the sky", "flying birds"),
    "snowfall": ("falling snow", "snowflakes in the air", "snowfall"),
    "flag": ("a flag", "a striped flag"),
}
_OBJECT_WORDS = {
    "boat": ("boat", "sailing boat"), "house": ("house", "cottage"), "castle": ("castle",), "tree": ("tree",),
    "car": ("car",), "lighthouse": ("lighthouse",), "windmill": ("windmill",), "tent": ("tent",),
    "balloon": ("hot air balloon", "balloon"), "rocket": ("rocket",), "mushroom": ("mushroom",),
    "train": ("train", "steam train"),
}  # fmt: skip
_COLOUR_WORDS = {colour: (colour,) for colour in COLOURS}

_ADD = ("add {}", "put {} into the picture", "draw {} too", "there should be {}", "let there be {}", "give it {}")
_REMOVE = ("remove {}", "take away {}", "get rid of {}", "erase {}", "make it without {}", "delete {}")
_REPLACE = (
    "replace the {old} with a {new}", "turn the {old} into a {new}", "swap the {old} for a {new}",
    "make it a {new}", "change the {old} to a {new}", "it should be a {new} instead of a {old}",
)  # fmt: skip
_RECOLOUR = (
    "make the {object} {new}", "paint the {object} {new}", "turn the {object} {new}", "make it {new}",
    "colour the {object} {new}", "change the colour to {new}", "what if the {object} were {new}",
)  # fmt: skip
_GROUND_EDITS: dict[str, tuple[str, ...]] = {
    "grass": ("put it on grass", "make the ground a meadow", "turn the ground into green grass",
              "have it stand in a grassy field"),
    "sand": ("put it in the desert", "make the ground sand", "move it to a sandy beach", "turn the ground into sand"),
    "snow": ("put it in the snow", "make the ground snow", "cover the ground with snow", "turn the ground into snow"),
    "water": ("put it on the water", "make the ground a lake", "let it float on the sea", "turn the ground into water"),
    "leaves": ("put it on fallen leaves", "cover the ground with autumn leaves", "turn the ground into leaves"),
}  # fmt: skip
_SKY_EDITS: dict[str, tuple[str, ...]] = {
    "day": ("make it day", "make the sky blue", "as a sunny day", "give it a clear blue sky", "change the sky to day"),
    "sunset": ("make it sunset", "add a sunset sky", "let the evening sun shine", "change the sky to sunset"),
    "night": ("make it night", "turn day into night", "give it a starry sky", "change the sky to night",
              "let it be dark"),
    "overcast": ("make it cloudy", "make the sky grey", "cover the sky with clouds", "change the sky to overcast"),
    "dawn": ("make it dawn", "make the sky pink", "let it be daybreak", "change the sky to dawn"),
}  # fmt: skip
_SEASON_EDITS: dict[str, tuple[str, ...]] = {
    "grass": ("make it summer", "change the season to summer", "as if it were spring"),
    "snow": ("make it winter", "change the season to winter", "as if it were winter"),
    "leaves": ("make it autumn", "change the season to autumn", "as if it were autumn"),
}
SEASONS = tuple(_SEASON_EDITS)
_STYLE_EDITS: dict[str, tuple[str, ...]] = {
    "photo": ("make it a photo", "turn it into a photograph", "as a real photo"),
    "pencil": ("make it a pencil sketch", "turn it into a pencil drawing", "as a pencil sketch"),
    "watercolour": ("make it a watercolour", "turn it into a watercolour painting", "as a watercolour"),
    "pixel": ("make it pixel art", "turn it into pixel art", "as 8-bit pixel art"),
    "comic": ("make it a comic", "turn it into a comic panel", "as a comic drawing"),
}
_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "ground": _GROUND_EDITS, "sky": _SKY_EDITS, "season": _SEASON_EDITS, "style": _STYLE_EDITS,
}  # fmt: skip
_JOIN = ("{} and {}", "{}, then {}", "{} and also {}")


@dataclass(frozen=True)
class Wording:
    """Which phrase names each attribute in a caption; an edited caption keeps those that the edit leaves alone."""

    picks: dict[str, int] = field(default_factory=dict)

    def of(self, slot: str, phrases: tuple[str, ...]) -> str:
        return phrases[self.picks.get(slot, 0) % len(phrases)]


@dataclass(frozen=True)
class Edit:
    """One asked change: ``attribute`` takes ``value``; for extras ``value`` is the extra that comes or goes."""

    task: str
    attribute: str
    value: str

    def apply(self, scene: Scene) -> Scene:
        """The exact answer: the same layout with the edited attribute."""
        if self.task == "add":
            return scene.with_(extras=tuple(sorted({*scene.extras, self.value})))
        if self.task == "remove":
            return scene.with_(extras=tuple(extra for extra in scene.extras if extra != self.value))
        return scene.with_(**{self.attribute: self.value})


def sample_wording(rng: np.random.Generator) -> Wording:
    slots = ("style", "object", "ground", "sky", "order", *EXTRAS)
    return Wording({slot: int(rng.integers(12)) for slot in slots})


def caption_of(scene: Scene, wording: Wording) -> str:
    """All attributes in words; 77 CLIP tokens always suffice."""
    noun = wording.of("object", _OBJECT_WORDS[scene.object])
    colour = _COLOUR_WORDS[scene.colour][0]
    ground = wording.of("ground", _GROUND_PHRASES[scene.ground])
    sky = wording.of("sky", _SKY_PHRASES[scene.sky])
    place = wording.of("order", (f"{ground} {sky}", f"{ground} {sky}", f"{sky} {ground}"))
    text = f"{article(colour)} {colour} {noun} {place}"
    if scene.extras:
        text += " with " + " and ".join(wording.of(extra, _EXTRA_PHRASES[extra]) for extra in scene.extras)
    return wording.of("style", _STYLE_PHRASES[scene.style]).format(text)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_edits(scene: Scene, rng: np.random.Generator, task: str | None = None) -> tuple[Edit, ...]:
    """One edit that changes ``scene``, or two of different attributes for task ``two``."""
    task = task or str(rng.choice(TASKS))
    if task != "two":
        return (_sample_edit(scene, rng, task),)
    kinds = rng.permutation(["add", "replace", "colour", "ground", "sky", "style"])[:2]
    return tuple(_sample_edit(scene, rng, str(kind)) for kind in kinds)


def _sample_edit(scene: Scene, rng: np.random.Generator, task: str) -> Edit:
    if task == "remove" and not scene.extras:
        task = "add"
    if task in ("add", "remove"):
        names = [extra for extra in EXTRAS if (extra in scene.extras) == (task == "remove")]
        return Edit(task, "extras", str(rng.choice(names)))
    attribute = {"replace": "object", "colour": "colour", "season": "ground"}.get(task, task)
    if task == "season":
        values = tuple(ground for ground in _SEASON_EDITS if ground != scene.ground)
    else:
        every = {"object": OBJECTS, "colour": COLOURS, "ground": GROUNDS, "sky": SKIES, "style": STYLES}[attribute]
        values = tuple(value for value in every if value != getattr(scene, attribute))
    return Edit(task, attribute, str(rng.choice(values)))


def apply_edits(scene: Scene, edits: tuple[Edit, ...]) -> Scene:
    for edit in edits:
        scene = edit.apply(scene)
    return scene


def instruction_of(scene: Scene, edits: tuple[Edit, ...], wording: Wording, rng: np.random.Generator) -> str:
    """The edits in words; two of them are joined in one sentence."""
    parts = [_instruction(scene, edit, wording, rng) for edit in edits]
    return parts[0] if len(parts) == 1 else str(rng.choice(_JOIN)).format(*parts)


def _instruction(scene: Scene, edit: Edit, wording: Wording, rng: np.random.Generator) -> str:
    def pick(phrases: tuple[str, ...]) -> str:
        return str(rng.choice(phrases))

    if edit.task == "add":
        return pick(_ADD).format(wording.of(edit.value, _EXTRA_PHRASES[edit.value]))
    if edit.task == "remove":
        phrase = wording.of(edit.value, _EXTRA_PHRASES[edit.value])
        return pick(_REMOVE).format(_definite(phrase))
    if edit.task == "replace":
        old = wording.of("object", _OBJECT_WORDS[scene.object])
        new = wording.of("object", _OBJECT_WORDS[edit.value])
        return pick(_REPLACE).format(old=old, new=new)
    if edit.task == "colour":
        return pick(_RECOLOUR).format(object=wording.of("object", _OBJECT_WORDS[scene.object]), new=edit.value)
    return pick(_PHRASES[edit.task][edit.value])


def _definite(phrase: str) -> str:
    for indefinite in ("a ", "the "):
        if phrase.startswith(indefinite):
            return "the " + phrase[len(indefinite) :]
    return "the " + phrase


@dataclass(frozen=True)
class EditExample:
    """A scene, what is asked of it, and the exact answer, each in words and as data."""

    scene: Scene
    edits: tuple[Edit, ...]
    edited_scene: Scene
    caption: str
    instruction: str
    edited_caption: str

    @property
    def task(self) -> str:
        return "two" if len(self.edits) > 1 else self.edits[0].task


def sample_example(scene: Scene, rng: np.random.Generator, task: str | None = None) -> EditExample:
    """Words and truth of one edit of ``scene``; ``task`` one of TASKS (a remove without extras becomes an add)."""
    wording = sample_wording(rng)
    edits = sample_edits(scene, rng, task)
    edited = apply_edits(scene, edits)
    return EditExample(
        scene, edits, edited, caption_of(scene, wording), instruction_of(scene, edits, wording, rng),
        caption_of(edited, wording),
    )  # fmt: skip
