"""The types of edits over open-ended captions, the union of those of published editing sets (docs/seed_triplets.md)."""

from __future__ import annotations

TASKS = {
    "add": "something that was not there",
    "remove": "something that is there no more",
    "replace": "one thing in place of another",
    "attribute": "attribute, colour or material of a thing",
    "background": "another place behind or around the subject",
    "style": "another medium, school or artist",
    "tone": "season, weather, time of day, light, mood",
    "action": "another action, pose or expression",
    "text": "words or figures that can be read in the picture",
    "count": "how many, how large, where in the picture",
}
"""The edit types, as ``task`` names them."""
