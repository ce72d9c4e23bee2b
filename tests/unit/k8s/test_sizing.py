"""The numbers of docs/kubernetes.md follow from its own formula and assumptions."""

from __future__ import annotations

import re

from tests.unit.k8s.rendering import ROOT

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
TEXT = " ".join(PAGE.split())  # wherever its lines break
RATE, PRICE = 60, 2.75


def rows() -> list[list[float]]:
    lines = re.findall(r"^\| [\d,]+ \|.*$", PAGE, re.MULTILINE)
    return [[float(cell.replace(",", "")) for cell in line.strip("| ").split("|")] for line in lines]


def test_every_row_of_the_table_is_what_the_formula_gives():
    assert f"r = {RATE} " in TEXT
    assert f"${PRICE} an A100 hour" in TEXT
    assert rows()[0][:3] == [454_445, 100, 100]
    for prompts, candidates, steps, evals, hours, dollars, on_16, on_128 in rows():
        assert evals == prompts * candidates * steps * 4
        exact = evals / RATE / 3600
        assert hours == round(exact)
        assert abs(dollars - exact * PRICE) < 1
        assert (on_16, on_128) == (round(exact / 16 / 24), round(exact / 128 / 24))


def test_the_numbers_of_the_text_are_what_the_formulas_give():
    hours = rows()[0][3] / RATE / 3600
    assert f"{hours / 313_010:.2f} A100 hours and ${hours * PRICE / 313_010:.2f} a pair" in TEXT
    assert f"{25.5 * 8:.0f} A100 hours, ${25.5 * 8 * PRICE:.0f}" in TEXT
    floor = 10_000 * 1_024 * 3 / 4 / RATE / 3600
    assert f"{floor:.0f} A100 hours, ${floor * PRICE:.0f}" in TEXT
    batch = 1_000_000 * 60 / RATE / 3600
    assert f"{batch:.0f} hours, ${batch * PRICE:.0f}" in TEXT
