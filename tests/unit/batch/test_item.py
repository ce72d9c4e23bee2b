"""Items: what each field may be, what is filled in, and when two of them ask for the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from small_batch import NOTHING, read

from ip2p.batch.item import (
    MAX_CHARACTERS,
    MAX_SEED,
    READERS,
    SETTINGS,
    EditSettings,
    Item,
    item_of,
)
from ip2p.errors import InputError

MODEL = "m"
EXAMPLE = Item(1, "one", "/in/a.png", "make it night", "one.png", EditSettings())
SET = EditSettings(
    steps=7, guidance_scale=3.5, image_guidance_scale=1.25, seed=9, negative_prompt="day", sampler="dpmpp_2m",
    resolution=64, size="64x48", restore_size=True, output_format="webp",
)  # fmt: skip


def held(item: Item, name: str) -> object:
    """What ``item`` holds of the field ``name`` of a row."""
    field = READERS[name][0]
    return getattr(item.settings if field in SETTINGS else item, field)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *[("id", value, str(value)) for value in ("a", "x" * 900, "a/b c", 7, 0, -3, "é")],
        *[("image", uri, uri) for uri in ("s3://b/a b.png", "/in/a.png", "/in/a..b.png", "/in/.../a.png", "/in/a:b.png",
                                          "data:image/png;base64,AA==", "data:image/png;base64,../..")],
        ("mask", "s3://b/mask.png", "s3://b/mask.png"),
        ("instruction", " make  it\n night ", "make it night"),
        ("instruction", "x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
        ("negative_prompt", "day\tlight", "day light"),
        *[("output", name, name) for name in ("a.png", "a/b/c.png", "_jobs/a.png", ".a.png", "a..png", "é" * 450)],
        ("version", "17-3", "17-3"),
        *[("steps", value, 1) for value in (1, "1", "001", 1.0, "1.0")],
        ("steps", 1000, 1000),
        *[("guidance_scale", value, 7.0) for value in (7, 7.0, "7", "7.0", "0.7e1")],
        ("guidance_scale", 0, 0.0),
        ("image_guidance_scale", "1000", 1000.0),
        ("image_guidance_scale", 1e-9, 1e-9),
        *[("seed", value, value) for value in (0, MAX_SEED)],
        ("seed", float(MAX_SEED), MAX_SEED),
        ("sampler", "dpmpp_2m", "dpmpp_2m"),
        ("sampler", "euler_ancestral", "euler_ancestral"),
        *[("resolution", value, value) for value in (8, 4096)],
        *[("size", text, text) for text in ("1x1", "99999x99999", "512x384")],
        ("size", "auto", ""),
        *[("restore_size", value, True) for value in (True, "true", "TRUE", "1", 1)],
        *[("restore_size", value, False) for value in (False, "false", "False", "0", 0)],
        *[("output_format", name, name) for name in ("png", "jpeg", "webp")],
    ],
)  # fmt: skip
def test_a_field_is_read(name, value, wanted):
    item = read({name: value})
    assert held(item, name) == wanted
    assert type(held(item, name)) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *[("id", value, "id is not text but") for value in (True, 1.5, ["a"], {"a": 1})],
        ("id", "x" * 901, "id has 901 characters, the limit is 900"),
        *[("image", uri, "nothing is fetched from") for uri in ("http://h/a.png", "https://h/a.png", "ftp://h/a", "file:///a")],
        *[("image", uri, "is neither s3://, a local path nor data:") for uri in ("gs://b/a.png", "HTTP://h/a.png", "x+s3://b/a")],
        *[("image", uri, r"holds '\.\.'") for uri in ("/in/../a.png", "../a.png", "s3://b/../a.png", "/in/..")],
        *[("image", value, "image is not text but") for value in (1, True, ["/a.png"], {"url": "/a.png"})],
        ("image", "/in/\ud83c.png", "image is not valid UTF-8"),
        ("mask", "http://h/a.png", "mask: nothing is fetched from http:"),
        ("mask", "/in/../a.png", "mask: "),
        ("instruction", "x" * (MAX_CHARACTERS + 1), "instruction has 1001 characters, the limit is 1000"),
        ("instruction", 5, "instruction is not text but int"),
        ("instruction", "a \udce9", "instruction is not valid UTF-8"),
        ("edit", 5, "edit is not text but int"),
        ("prompt", 5, "prompt is not text but int"),
        ("negative_prompt", "x" * (MAX_CHARACTERS + 1), "negative_prompt has 1001 characters"),
        ("negative_prompt", True, "negative_prompt is not text but bool"),
        *[("output", name, "is no name inside the output folder") for name in (
            "/a.png", "../a.png", "a/../b.png", "a/..", "..", "./a.png", "a/./b.png", "a//b.png", "a/", "é" * 451)],
        *[("output", name, "is a name that the job's own files have; choose another") for name in (
            "_job", "_job/a.png", "_job/parts/a.png", "contact_sheet.png", "results.jsonl", "failed.jsonl",
            "rejected.jsonl", "summary.json", "output.jsonl", "error.jsonl")],
        ("output", 7, "output is not text but int"),
        ("version", 7, "version is not text but int"),
        *[(name, value, f"{name} must be a whole number") for name in ("steps", "seed", "resolution") for value in (
            True, False, -1, "-1", 1.5, "7.5", "7x", "x", " 7", "+7", "7\n", "1e3", float("nan"), float("inf"), "٧",
            [7], 10**13, 10**400, "1.0.0")],
        *[("steps", value, "steps must be a whole number from 1 to 1000") for value in (0, 1001, "0")],
        ("seed", MAX_SEED + 1, "seed must be a whole number from 0 to 4294967295, got '4294967296'"),
        *[("resolution", value, "resolution must be a whole number from 8 to 4096") for value in (7, 4097)],
        *[(name, value, f"{name} must be a number from 0 to 1000")
          for name in ("guidance_scale", "image_guidance_scale")
          for value in (True, -0.01, -1, "-1", 1000.01, 10**400, "7.5x", "x", float("nan"), "nan", float("inf"), "inf",
                        [7])],
        *[("sampler", value, "sampler must be euler_ancestral or dpmpp_2m")
          for value in ("euler", "DPMPP_2M", 1, ["dpmpp_2m"])],
        *[("size", text, "size must be auto or WIDTHxHEIGHT") for text in (
            "0x8", "8", "8x", "x8", "8X8", "8x8x8", "-8x8", "8.0x8", " 8x8", "100000x8", "8x08", "Auto")],
        ("size", 64, "size is not text but int"),
        *[("restore_size", value, "restore_size must be true or false") for value in ("yes", 2, -1, " true", [True])],
        *[("output_format", value, "output_format must be png or jpeg or webp")
          for value in ("gif", "PNG", "jpg", True)],
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused_with_what_is_wanted(name, value, said):
    with pytest.raises(InputError, match=said):
        read({"instruction": None, name: value} if name in ("edit", "prompt") else {name: value})


@pytest.mark.parametrize(
    "name", ["steps", "guidance_scale", "seed", "size", "sampler", "restore_size", "output_format"]
)
def test_a_message_shows_no_more_than_the_beginning_of_a_long_value(name):
    with pytest.raises(InputError) as caught:
        read({name: "7" * 5000 + "x"})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("name", ["picture", "Image", "step", "n", "error", "line", "settings", "key"])
def test_an_unknown_field_is_refused_with_what_is_known(name):
    with pytest.raises(InputError, match=f"unknown field '{name}'; known: id, image, .*output_format .*--ignore"):
        read({name: "x"})


def test_a_field_that_is_empty_is_as_one_that_is_not_there():
    empty = {name: value for value in ("", None) for name in READERS if name not in ("image", "instruction")}
    assert read(empty) == read()
    assert read({"unknown": ""}) == read({"unknown": None}) == read()


def test_zero_and_false_are_values():
    defaults = dataclasses.replace(NOTHING, settings=EditSettings(seed=5, guidance_scale=5.0, restore_size=True))
    row = {"image": "/a.png", "instruction": "x", "seed": 0, "guidance_scale": 0, "restore_size": False, "id": 0}
    item = item_of(row, 1, defaults)
    assert (item.settings.seed, item.settings.guidance_scale, item.settings.restore_size) == (0, 0.0, False)
    assert item.id == "0"


@pytest.mark.parametrize("names", [("instruction", "edit"), ("edit", "prompt"), ("prompt", "instruction")])
def test_two_names_of_one_field_are_refused(names):
    with pytest.raises(InputError, match="instruction is given twice"):
        item_of({"image": "/a.png", **dict.fromkeys(names, "make it night")}, 1, NOTHING)


@pytest.mark.parametrize("name", ["instruction", "edit", "prompt"])
def test_the_instruction_has_three_names(name):
    assert item_of({"image": "/a.png", name: "make it night"}, 1, NOTHING).instruction == "make it night"


@pytest.mark.parametrize(
    "row", [{"instruction": "x"}, {"instruction": "x", "image": ""}, {"instruction": "x", "image": None}]
)
def test_an_item_without_image_is_refused(row):
    with pytest.raises(InputError, match="no image; name it in the field image"):
        item_of(row, 1, NOTHING)


@pytest.mark.parametrize("words", [None, "", " ", "\n\t"])
def test_an_item_without_instruction_is_refused(words):
    with pytest.raises(InputError, match=r"no instruction; .* --instruction"):
        item_of({"image": "/a.png", "instruction": words}, 1, NOTHING)


@pytest.mark.parametrize("other", [{"resolution": 64}, {"restore_size": True}])
def test_a_size_stands_alone(other):
    with pytest.raises(InputError, match="size says all of the result's size; leave out resolution and restore_size"):
        read({"size": "64x64", **other})
    assert read({"size": "auto", **other}).settings.size == ""
    assert read({"size": "64x64", "restore_size": False}).settings.size == "64x64"


@pytest.mark.parametrize("other", [{"resolution": 64}, {"restore_size": True}])
def test_a_size_stands_alone_whether_the_row_or_the_defaults_name_it(other):
    defaults = dataclasses.replace(NOTHING, settings=EditSettings(size="64x64"))
    with pytest.raises(InputError, match="size says all"):
        item_of({"image": "/a.png", "instruction": "x", **other}, 1, defaults)
    defaults = dataclasses.replace(NOTHING, settings=EditSettings(**other))
    with pytest.raises(InputError, match="size says all"):
        item_of({"image": "/a.png", "instruction": "x", "size": "64x64"}, 1, defaults)


def test_what_a_row_leaves_out_is_that_of_the_defaults():
    defaults = dataclasses.replace(NOTHING, instruction="make it day", settings=dataclasses.replace(SET, size=""))
    item = item_of({"image": "/a.png", "steps": "8"}, 17, defaults)
    assert (item.line, item.instruction) == (17, "make it day")
    assert item.settings == dataclasses.replace(SET, size="", steps=8)
    assert item_of({"image": "/a.png", "instruction": "my own"}, 1, defaults).instruction == "my own"


def test_without_defaults_the_settings_are_those_of_the_documentation():
    assert read().settings == EditSettings(
        steps=20, guidance_scale=None, image_guidance_scale=None, seed=None, negative_prompt="",
        sampler="euler_ancestral", resolution=None, size="", restore_size=False, output_format="png",
    )  # fmt: skip


def test_every_field_can_be_set_by_a_row():
    row = {name: getattr(SET, name) for name in SETTINGS if name not in ("size", "resolution", "restore_size")}
    more = {"id": "one", "output": "o.png", "mask": "/m.png", "version": "v"}
    item = read({**row, **more})
    assert item.settings == dataclasses.replace(SET, size="", resolution=None, restore_size=False)
    assert (item.id, item.output, item.mask, item.version) == ("one", "o.png", "/m.png", "v")
    assert {READERS[name][0] for name in READERS} == {
        *row,
        *more,
        "image",
        "instruction",
        "size",
        "resolution",
        "restore_size",
    }


# ---- names


def test_an_item_without_id_is_named_after_all_that_it_asks_for():
    assert read().id == read(line=None).id
    assert len(read().id) == 16
    others = [{"image": "/in/b.png"}, {"mask": "/m.png"}, {"instruction": "x"}, {"steps": 3}, {"seed": 3}]
    assert len({read().id, *(read(other).id for other in others)}) == 6


def test_the_same_row_on_another_line_has_the_same_id():
    row = {"image": "/a.png", "instruction": "x"}
    assert item_of(row, 1, NOTHING).id == item_of(row, 2, NOTHING).id


@pytest.mark.parametrize(
    ("id_", "image_format", "output"),
    [
        ("a", "png", "a.png"),
        ("a", "jpeg", "a.jpg"),
        ("a", "webp", "a.webp"),
        ("a/b c:d", "png", "a_b_c_d.png"),
        ("../../etc/passwd", "png", ".._.._etc_passwd.png"),
        ("_job/lease", "png", "_job_lease.png"),
        ("..", "png", "...png"),
        ("é", "png", "_.png"),
        ("A-b_c.d", "png", "A-b_c.d.png"),
    ],
)
def test_an_item_without_output_is_written_under_its_id(id_, image_format, output):
    assert read(id=id_, output_format=image_format).output == output


def test_a_given_output_is_kept_whatever_the_id():
    assert read(id="a", output="b/c.png").output == "b/c.png"
    assert read(output="b/c.png").id == read().id


# ---- what is the same


def other(value: object) -> object:
    """Another value than ``value``, of its type."""
    return (not value) if isinstance(value, bool) else f"{value}1" if isinstance(value, str) else value + 1  # type: ignore[operator]


@pytest.mark.parametrize("name", SETTINGS)
def test_two_items_that_differ_in_one_setting_have_two_keys(name):
    item = dataclasses.replace(EXAMPLE, settings=SET)
    changed = dataclasses.replace(SET, **{name: other(getattr(SET, name))})
    assert dataclasses.replace(item, settings=changed).key(MODEL) != item.key(MODEL)


@pytest.mark.parametrize("name", ["guidance_scale", "image_guidance_scale", "resolution", "seed"])
def test_the_models_own_value_is_no_other_value(name):
    given = dataclasses.replace(EXAMPLE, settings=SET)
    left_out = dataclasses.replace(EXAMPLE, settings=dataclasses.replace(SET, **{name: None}))
    zero = dataclasses.replace(EXAMPLE, settings=dataclasses.replace(SET, **{name: 0}))
    assert len({one.key(MODEL) for one in (given, left_out, zero)}) == 3


@pytest.mark.parametrize("name", ["image", "version", "mask", "instruction", "output"])
def test_two_items_that_differ_in_what_is_read_or_written_have_two_keys(name):
    assert dataclasses.replace(EXAMPLE, **{name: other(getattr(EXAMPLE, name))}).key(MODEL) != EXAMPLE.key(MODEL)


def test_an_id_matters_where_it_gives_the_seed():
    assert dataclasses.replace(EXAMPLE, id="two").key(MODEL) != EXAMPLE.key(MODEL)


def test_the_place_in_the_manifest_does_not_matter():
    assert dataclasses.replace(EXAMPLE, line=99).key(MODEL) == EXAMPLE.key(MODEL)


def test_another_model_is_another_key():
    assert EXAMPLE.key("m2") != EXAMPLE.key(MODEL)


def test_what_follows_each_other_is_not_confused():
    one = dataclasses.replace(EXAMPLE, image="/a", version="b")
    two = dataclasses.replace(EXAMPLE, image="/ab", version="")
    three = dataclasses.replace(EXAMPLE, image="/a", version="", mask="b")
    assert len({item.key(MODEL) for item in (one, two, three)}) == 3


def test_a_change_of_what_a_request_gives_changes_every_key(monkeypatch):
    before = EXAMPLE.key(MODEL)
    monkeypatch.setattr("ip2p.batch.item.NUMERICS", 2)
    assert EXAMPLE.key(MODEL) != before


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"steps": 7}, {"steps": "7"}),
        ({"steps": 7}, {"steps": 7.0}),
        ({"guidance_scale": 7}, {"guidance_scale": "7.0"}),
        ({"guidance_scale": 0}, {"guidance_scale": "-0"}),
        ({"restore_size": True}, {"restore_size": "1"}),
        ({"size": "auto"}, {}),
        ({"steps": 20, "sampler": "euler_ancestral", "output_format": "png", "restore_size": "false"}, {}),
        ({"instruction": "make it night"}, {"instruction": "  make it  night\n"}),
        ({"id": 7}, {"id": "7"}),
    ],
)
def test_the_same_said_differently_is_the_same_key(one, same):
    named = {"output": "a.png"} if "id" in one else {"id": "a", "output": "a.png"}
    assert read({**named, **one}).key(MODEL) == read({**named, **same}).key(MODEL)


def test_keys_and_fingerprints_are_32_hex_digits_that_other_machines_find_too():
    program = (
        "import dataclasses; from ip2p.batch.item import *\n"
        "item = Item(1, 'one', '/in/a.png', 'make it night', 'one.png', EditSettings())\n"
        "print(item.key('m'), item.fingerprint('m', 'v'), item.seed)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said == [EXAMPLE.key(MODEL), EXAMPLE.fingerprint(MODEL, "v"), str(EXAMPLE.seed)]
    assert all(len(text) == 32 and set(text) <= set("0123456789abcdef") for text in said[:2])


def test_a_fingerprint_is_that_of_the_very_pictures():
    plain = EXAMPLE.fingerprint(MODEL, "v")
    assert plain == EXAMPLE.fingerprint(MODEL, "v", "")
    others = [
        EXAMPLE.fingerprint(MODEL, "v2"), EXAMPLE.fingerprint(MODEL, "v", "m"), EXAMPLE.fingerprint(MODEL, "", "v"),
        EXAMPLE.fingerprint("m2", "v"), dataclasses.replace(EXAMPLE, instruction="x").fingerprint(MODEL, "v"),
        EXAMPLE.key(MODEL),
    ]  # fmt: skip
    assert len({plain, *others}) == 7


# ---- seeds


def test_an_item_without_seed_has_one_of_its_own_that_only_its_id_decides():
    seeds = [dataclasses.replace(EXAMPLE, id=str(number)).seed for number in range(300)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert max(seeds) > MAX_SEED * 0.95
    assert dataclasses.replace(EXAMPLE, line=5, image="/b.png", output="x.png").seed == EXAMPLE.seed


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_a_seed_that_is_asked_for_is_the_seed(seed):
    assert read(seed=seed).seed == seed
