"""Every command of ours that the documentation and the Makefile show is one that its own parser takes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests.command_lines import problem, shell_commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(?:bash|sh)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def shown(page: Path) -> list[list[str]]:
    """The words of each command in the fenced blocks of a page."""
    blocks = [textwrap.dedent(body) for _, body in BLOCK.findall(page.read_text())]
    return [words for block in blocks for words in shell_commands(block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_its_parser_takes(page):
    found = {" ".join(words): problem(words) for words in shown(page)}
    assert {line: said for line, said in found.items() if said} == {}


def test_the_commands_are_found_at_all():
    ours = [words for page in PAGES for words in shown(page) if problem(words) is not None]
    assert len(ours) > 50
    assert {"jobs/datagen.py", "jobs/train.py", "jobs/batch_edit.py", "jobs/evaluate.py"} <= {w[1] for w in ours}


def test_the_makefile_asks_in_words_that_are_known():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipes = re.findall(r"^\t@?(.*)", text, re.MULTILINE)
    found = {" ".join(words): problem(words) for recipe in recipes for words in shell_commands(recipe)}
    assert {line: said for line, said in found.items() if said} == {}
    assert sum(said == "" for said in found.values()) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page):
    places = [place for place, _ in LINK.findall(page.read_text())]
    assert [place for place in places if not (page.parent / place).exists()] == []


def test_the_readme_leads_to_each_place_where_it_runs():
    text = (ROOT / "README.md").read_text()
    section = text.split("## Where it runs")[1].split("\n## ")[0]
    assert {place for place, _ in LINK.findall(section)} == {
        f"docs/{name}.md" for name in ("laptop", "one_gpu", "many_machines", "kubernetes", "s3")
    }
