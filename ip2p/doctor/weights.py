"""Are the weights that will be asked for there, whole, and of the right shape?"""

from __future__ import annotations

from ip2p.config import load_recipe
from ip2p.doctor.finding import Finding, error, fine
from ip2p.errors import Ip2pError


def check_edit_weights(ckpt: str) -> Finding:
    from ip2p.models.preflight import check_edit_model

    try:
        ids = check_edit_model(ckpt)
    except Ip2pError as problem:
        return refused("edit model", problem)
    return fine("edit model", f"{ckpt}: whole, UNet {ids['unet'][:12]}")


def check_recipe_weights(recipe: str, overrides: tuple[str, ...] = ()) -> Finding:
    """Those that jobs/datagen.py would load."""
    from ip2p.models.preflight import check_model_files

    try:
        ids = check_model_files(load_recipe(recipe, list(overrides)))
    except Ip2pError as problem:
        return refused("weights", problem)
    return fine("weights", f"{recipe}: {', '.join(sorted(ids))} are whole")


def refused(name: str, problem: Ip2pError) -> Finding:
    """``problem`` parted into what was found and the remedy."""
    found, _, remedy = str(problem).rpartition("; ")
    return error(name, found or str(problem), remedy if found else "name other weights")
