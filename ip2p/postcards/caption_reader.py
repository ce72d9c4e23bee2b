"""Reads postcards' captions back: from words to attributes, and from a triplet to the edit that it asks for.

The grammar is small enough to be read exactly; what cannot be read was not written by its rules.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence

from ip2p.postcards import grammar
from ip2p.postcards.scene import COLOURS
from ip2p.schema import Triplet

Attributes = dict[str, str | frozenset[str]]


def read_caption(text: str) -> Attributes | None:
    """object, colour, ground, sky, style (names as in scene.py) and extras (a set); None if the grammar says no such
    thing."""
    match = _caption_pattern().fullmatch(text)
    if match is None:
        return None
    found = {slot: words for slot, words in match.groupdict().items() if words}
    ground, sky = (found.get(slot) or found[f"{slot}_"] for slot in ("ground", "sky"))
    extras = frozenset(_named(part, grammar._EXTRA_PHRASES) for part in found.get("extras", "").split(" and ") if part)
    return {
        "object": _named(found["object"], grammar._OBJECT_WORDS), "colour": found["colour"],
        "ground": _named(ground, grammar._GROUND_PHRASES), "sky": _named(sky, grammar._SKY_PHRASES),
        "style": _style_of(text, found["scene"]), "extras": extras,
    }  # fmt: skip


def read_task(triplet: Triplet) -> str | None:
    """Which of ``grammar.TASKS`` a triplet is: what differs between its captions, if the instruction says just that.

    None where a caption or the instruction is not the grammar's, or they do not belong together.
    """
    before, after = read_caption(triplet.caption), read_caption(triplet.edited_caption)
    if before is None or after is None:
        return None
    changes = _changes(before, after)
    if len(changes) == 1:
        said = (task for task, phrases in _ways_to_say(before, *changes[0]) if triplet.instruction in phrases)
        return next(said, None)
    if len(changes) == 2:
        for joint in (template.replace("{}", "") for template in grammar._JOIN):
            parts = triplet.instruction.split(joint)
            if len(parts) == 2 and any(_says(before, parts, order) for order in itertools.permutations(changes)):
                return "two"
    return None


_Change = tuple[str, str]  # what changes, and the value that it takes; of extras the one that comes or goes


def _changes(before: Attributes, after: Attributes) -> list[_Change]:
    changed = [(name, str(after[name])) for name in before if name != "extras" and before[name] != after[name]]
    gone, new = (sorted(set(a["extras"]) - set(b["extras"])) for a, b in ((before, after), (after, before)))
    return [*changed, *(("remove", extra) for extra in gone), *(("add", extra) for extra in new)]


def _says(before: Attributes, parts: Sequence[str], changes: Sequence[_Change]) -> bool:
    return all(
        any(part in phrases for _, phrases in _ways_to_say(before, *change))
        for part, change in zip(parts, changes, strict=True)
    )


def _ways_to_say(before: Attributes, what: str, value: str) -> list[tuple[str, set[str]]]:
    """Tasks that a change may be, each with all instructions for it."""
    nouns = grammar._OBJECT_WORDS[str(before["object"])]
    if what == "add":
        return [("add", _filled(grammar._ADD, grammar._EXTRA_PHRASES[value]))]
    if what == "remove":
        definite = [grammar._definite(phrase) for phrase in grammar._EXTRA_PHRASES[value]]
        return [("remove", _filled(grammar._REMOVE, definite))]
    if what == "object":
        words = itertools.product(grammar._REPLACE, nouns, grammar._OBJECT_WORDS[value])
        return [("replace", {phrase.format(old=old, new=new) for phrase, old, new in words})]
    if what == "colour":
        return [("colour", {phrase.format(object=noun, new=value) for phrase in grammar._RECOLOUR for noun in nouns})]
    tasks = ("ground", "season") if what == "ground" else (what,)
    return [(task, set(grammar._PHRASES[task].get(value, ()))) for task in tasks]


def _filled(templates: Sequence[str], words: Sequence[str]) -> set[str]:
    return {template.format(word) for template in templates for word in words}


@functools.cache
def _caption_pattern() -> re.Pattern[str]:
    def one_of(phrases: list[str]) -> str:
        return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))

    tables = (grammar._GROUND_PHRASES, grammar._SKY_PHRASES, grammar._EXTRA_PHRASES, grammar._OBJECT_WORDS)
    grounds, skies, extras, nouns = (
        one_of([phrase for phrases in table.values() for phrase in phrases]) for table in tables
    )
    place = f"(?:(?P<ground>{grounds}) (?P<sky>{skies})|(?P<sky_>{skies}) (?P<ground_>{grounds}))"
    scene = f"an? (?P<colour>{'|'.join(COLOURS)}) (?P<object>{nouns}) {place}"
    scene += f"(?: with (?P<extras>(?:{extras})(?: and (?:{extras}))*))?"
    styles = [phrase for phrases in grammar._STYLE_PHRASES.values() for phrase in phrases]
    before, after = ({part for style in styles if (part := style.split("{}")[side])} for side in (0, 1))
    return re.compile(f"(?:{one_of([*before])})?(?P<scene>{scene})(?:{one_of([*after])})?")


def _named(words: str, table: Mapping[str, tuple[str, ...]]) -> str:
    return next(name for name, phrases in table.items() if words in phrases)


def _style_of(text: str, scene: str) -> str:
    frame = text.replace(scene, "{}", 1)
    return next((name for name, phrases in grammar._STYLE_PHRASES.items() if frame in phrases), "")
