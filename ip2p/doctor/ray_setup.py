"""Ray's version and its lock: without a token anybody who reaches the dashboard runs code here. Does not import Ray."""

from __future__ import annotations

import importlib.metadata
import json
import os
import stat
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from ip2p.doctor.finding import Finding, error, fine, warning

LEAST = (2, 60)
TIMEOUT_S = 5


def check_ray() -> Finding:
    """The version that is installed here."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return error("ray", "is not installed", "make env")
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST:
        return error("ray", f"{version} is installed, 2.60 or newer is needed", "make env")
    return fine("ray", version)


def check_auth(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Finding:
    """Whether Ray asks for a token, and whether others on this machine can read it."""
    mode = environment.get("RAY_AUTH_MODE", "")
    place = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if mode == "disabled" or (not mode and environment.get("RAY_ADDRESS")):
        remedy = "start the cluster with RAY_AUTH_MODE=token; whoever reaches its dashboard runs code there otherwise"
        return warning("ray token", f"RAY_AUTH_MODE is {mode or 'not set'}", remedy)
    if place.exists() and stat.S_IMODE(place.stat().st_mode) & 0o077:
        return error("ray token", f"{place} can be read by others", f"chmod 600 {place}")
    return fine("ray token", f"RAY_AUTH_MODE is {mode or 'token, set by the jobs themselves'}")


def check_cluster(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether the dashboard that the environment names answers, refuses strangers, and runs our version of Ray."""
    address = environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_DASHBOARD_ADDRESS") or ""
    if not address:
        return fine("cluster", "none is named: jobs start a private Ray")
    try:
        if _status(f"{address}/api/version") != 401:
            remedy = "start it with RAY_AUTH_MODE=token, or keep its network private"
            return warning("cluster", f"{address} answers without a token", remedy)
        token = (
            environment.get("RAY_AUTH_TOKEN") or Path(environment.get("RAY_AUTH_TOKEN_PATH", "")).read_text().strip()
        )
        version = json.loads(_read(f"{address}/api/version", token))["ray_version"]
    except (OSError, ValueError, KeyError) as problem:
        remedy = "start it, correct RAY_API_SERVER_ADDRESS, or set RAY_AUTH_TOKEN"
        return error("cluster", f"{address}: {problem}", remedy)
    mine = importlib.metadata.version("ray")
    if version != mine:
        return error(
            "cluster", f"{address} runs Ray {version}, here is {mine}", f"install ray=={version} here, or there {mine}"
        )
    return fine("cluster", f"{address}: Ray {version}, asks for its token")


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def _read(url: str, token: str) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return bytes(answer.read())
