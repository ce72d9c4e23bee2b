"""Keys and checks as a server's flags name them."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ip2p.errors import InputError
from serve.settings import KEYS_VARIABLE, Settings, key_digest, load_check, read_keys


def digests(*keys: str) -> frozenset[bytes]:
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


def in_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "keys.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_holds_a_key_a_line_with_comments_and_blank_lines(tmp_path: Path) -> None:
    path = in_file(tmp_path, "# for the team\n\nfirst  # of Ada\r\n  second\n#third\n")
    assert read_keys(path, {}) == digests("first", "second")


def test_the_environment_holds_keys_with_commas_and_adds_to_the_file(tmp_path: Path) -> None:
    assert read_keys(None, {KEYS_VARIABLE: "one, two,,"}) == digests("one", "two")
    assert read_keys(in_file(tmp_path, "three"), {KEYS_VARIABLE: "one"}) == digests("one", "three")


def test_without_any_a_server_is_open() -> None:
    assert read_keys(None, {}) == frozenset()


@pytest.mark.parametrize("text", ["", "\n \n", "# only a comment\n"])
def test_a_file_without_a_key_does_not_make_an_open_server(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"keys\.txt: no key in it"):
        read_keys(in_file(tmp_path, text), {KEYS_VARIABLE: "one"})


@pytest.mark.parametrize("text", [" ", ",", "\n"])
def test_a_variable_without_a_key_does_not_make_an_open_server(text: str) -> None:
    with pytest.raises(InputError, match=KEYS_VARIABLE):
        read_keys(None, {KEYS_VARIABLE: text})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, in_file(tmp_path, b"\xff\xfe\x00")):
        with pytest.raises(InputError, match="the keys cannot be read"):
            read_keys(path, {})


def test_a_key_may_have_the_mark_of_a_comment_in_it(tmp_path: Path) -> None:
    assert read_keys(in_file(tmp_path, "abc#def\n"), {}) == digests("abc#def")


def test_a_file_that_an_editor_marked_as_unicode_holds_its_keys(tmp_path: Path) -> None:
    assert read_keys(in_file(tmp_path, "\ufefffirst\nsecond\n"), {}) == digests("first", "second")


def test_keys_are_not_kept_as_they_are() -> None:
    settings = Settings(key_digests=read_keys(None, {KEYS_VARIABLE: "open-sesame"}))
    assert "sesame" not in repr(settings)
    assert key_digest("open-sesame") in settings.key_digests


def test_the_first_model_is_taken_where_none_is_named() -> None:
    assert Settings(models={"night": "a", "day": "b"}).default_model == "night"


# ---- checks


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("a_house_rule")
    made.look = lambda picture, which: f"{which} is too dark" if picture.mean() < 10 else None  # type: ignore[attr-defined]
    made.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_house_rule", made)
    return made


@pytest.mark.usefixtures("module")
def test_a_check_is_found_by_module_and_function() -> None:
    assert load_check("a_house_rule:look")(np.zeros((8, 8, 3), np.uint8), "input") == "input is too dark"


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["a_house_rule:number", "a_house_rule:gone", "a_house_rule", "nowhere:look", ":", ""])
def test_a_check_that_is_not_there_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(InputError, match=f"--check {name}: "):
        load_check(name)
