"""Drawing a prompt's candidates: noise seed, Prompt-to-Prompt threshold and guidance (InstructPix2Pix, section 3.1.2).

The released code chains its draws through one global generator, so a run cannot be repeated or split. Here each number
belongs to (run seed, prompt, k): asking for more candidates adds some and changes none.
"""

from __future__ import annotations

from ip2p.config import Recipe
from ip2p.schema import Candidate
from ip2p.seeds import derive_seed, unit_uniform


def draw_candidates(recipe: Recipe, prompt_id: str) -> list[Candidate]:
    """``recipe.pairs.candidates`` unscored candidates; seeds are distinct and below 2**32 (the released range)."""
    pairs = recipe.pairs
    drawn: list[Candidate] = []
    seeds: set[int] = set()
    for k in range(pairs.candidates):
        seed = derive_seed(recipe.seed, prompt_id, k) % 2**32
        while seed in seeds:  # once in a million prompts; the exported files are named by the seed
            seed = (seed + 1) % 2**32
        seeds.add(seed)
        threshold = _between(pairs.p2p_min, pairs.p2p_max, recipe.seed, prompt_id, k, "p2p_threshold")
        guidance = _between(pairs.guidance_min, pairs.guidance_max, recipe.seed, prompt_id, k, "guidance_scale")
        drawn.append(Candidate(seed=seed, p2p_threshold=threshold, guidance_scale=guidance))
    return drawn


def _between(low: float, high: float, *identity: object) -> float:
    return low + (high - low) * unit_uniform(*identity)
