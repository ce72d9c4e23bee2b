from __future__ import annotations

import pytest


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused must be refused before a cluster is joined."""

    def refuse() -> None:
        raise AssertionError("a cluster was joined")

    monkeypatch.setattr("jobs._ray.connect", refuse)
