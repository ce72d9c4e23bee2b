"""What comes over HTTP is what the library makes: pictures, variants, sizes, masks, formats, and what a file tells."""

from __future__ import annotations

import io
import json
import typing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image
from serving import Service, Steps, far_apart, file_of, files_in, picture_in, pixels, until

from ip2p.editing.editor import Editor
from ip2p.images import carried_text, decode_image

pytestmark = pytest.mark.service

SETTINGS: list[dict[str, typing.Any]] = [
    {"num_inference_steps": 4},
    {"num_inference_steps": 5, "seed": 2**32 - 1, "sampler": "dpmpp_2m", "guidance_scale": 3.25},
    {"image_guidance_scale": 1, "guidance_scale": 7.5},
    {"guidance_scale": 0, "image_guidance_scale": 0},
    {"negative_prompt": "snow on water", "resolution": 24},
    {"restore_size": True, "prompt": "add a moon, crème brûlée"},
]
RENAMED = {"num_inference_steps": "steps", "prompt": "instructions"}


def made_alone(edit_model, picture: np.ndarray, fields: dict[str, typing.Any]) -> np.ndarray:
    """What the library's Editor makes of the same fields."""
    settings = {"instructions": "make it night", "steps": 3, "seed": 1}
    settings |= {RENAMED.get(name, name): value for name, value in fields.items()}
    return Editor(edit_model).edit([picture], [settings.pop("instructions")], **settings)[0]


@pytest.mark.parametrize("fields", SETTINGS, ids=lambda fields: "-".join(fields))
def test_an_edit_is_what_the_editor_makes_alone(service: Service, edit_model, fields) -> None:
    picture = pixels(3, 40, 28)
    served = picture_in(service.edit(file_of(picture), **fields))
    assert far_apart(served, made_alone(edit_model, picture, fields)) <= 1


def test_strangers_at_the_same_time_each_get_their_own_edit(service: Service, edit_model) -> None:
    engine = service.engine()
    calls, rows = engine.calls, engine.row_evals
    pictures = [pixels(number, 16 + 4 * (number % 2), 16) for number in range(8)]
    fields = [{**SETTINGS[number % 6], "num_inference_steps": 8 + number} for number in range(8)]
    with ThreadPoolExecutor(8) as people:
        answers = list(people.map(lambda n: service.edit(file_of(pictures[n]), **fields[n]), range(8)))
    for picture, its, answer in zip(pictures, fields, answers, strict=True):
        assert far_apart(picture_in(answer), made_alone(edit_model, picture, its)) <= 1
    assert engine.calls - calls < (engine.row_evals - rows) / 3  # or nothing was shared


def test_three_variants_are_the_edits_of_three_seeds_that_follow_each_other(service: Service) -> None:
    answer = service.edit(n=3, seed=2**32 - 2)
    assert answer.json()["ip2p"]["seeds"] == [2**32 - 2, 2**32 - 1, 0]
    for file, seed in zip(files_in(answer), (2**32 - 2, 2**32 - 1, 0), strict=True):
        assert far_apart(decode_image(file), picture_in(service.edit(seed=seed))) <= 1
        assert json.loads(carried_text(file))["seed"] == seed


def test_an_edit_without_a_seed_says_which_it_took(service: Service) -> None:
    answers = [service.edit(seed=None) for _ in range(2)]
    seeds = [answer.json()["ip2p"]["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    assert far_apart(picture_in(service.edit(seed=seeds[0])), picture_in(answers[0])) <= 1


@pytest.mark.parametrize(("deterministic", "most"), [(True, 1), (False, 2)])
def test_deterministic_edits_share_their_calls_with_nobody(
    service: Service, steps: Steps, deterministic: bool, most: int
) -> None:
    with ThreadPoolExecutor(1) as person:
        pair = person.submit(service.edit, n=2, num_inference_steps=6, deterministic=deterministic)
        until(lambda: len(service.engine()._edits) == 2 and all(edit._prepared for edit in service.engine()._edits))
        steps.let()
        assert len(files_in(pair.result(30))) == 2
    assert max(steps.shared_by) == most


def test_deterministic_edits_are_the_same_bytes_every_time(service: Service) -> None:
    first, second = (files_in(service.edit(deterministic=True, num_inference_steps=6)) for _ in range(2))
    assert first == second


# ---- sizes


@pytest.mark.parametrize(("size", "shape"), [("24x16", (16, 24)), ("16x32", (32, 16)), ("auto", (12, 16))])
def test_the_result_has_the_size_that_was_asked_for(service: Service, size: str, shape: tuple[int, int]) -> None:
    answer = service.edit(file_of(pixels(1, 30, 20)), size=size)
    assert picture_in(answer).shape[:2] == shape
    assert answer.json()["size"] == f"{shape[1]}x{shape[0]}"


def test_the_size_of_the_input_can_be_had_back(service: Service) -> None:
    assert picture_in(service.edit(file_of(pixels(1, 37, 21)), restore_size=True)).shape == (21, 37, 3)


def test_a_field_that_says_what_the_default_is_changes_nothing(service: Service) -> None:
    said = {
        "n": 1, "size": "auto", "output_format": "png", "stream": False, "restore_size": False, "model": "tiny",
        "sampler": "euler_ancestral", "guidance_start": 0, "guidance_end": 1, "priority": "interactive",
        "deterministic": False, "negative_prompt": "", "background": "auto", "quality": "auto",
    }  # fmt: skip
    assert far_apart(picture_in(service.edit(**said)), picture_in(service.edit())) <= 1


def test_guidance_in_a_part_of_the_steps_costs_fewer_rows(service: Service) -> None:
    whole = service.edit(num_inference_steps=10).json()["usage"]["output_tokens"]
    half = service.edit(num_inference_steps=10, guidance_start=0.5).json()["usage"]["output_tokens"]
    assert (whole, half) == (30, 5 + 15)


# ---- masks


def mask_files(width: int = 16, height: int = 16) -> dict[str, bytes]:
    """The right half is to be edited, said in every way."""
    white = np.zeros((height, width), np.uint8)
    white[:, width // 2 :] = 255
    clear = np.dstack([pixels(9, width, height), 255 - white])
    return {
        "white": file_of(white),
        "white in colours": file_of(np.dstack([white] * 3)),
        "one bit": file_of(Image.fromarray(white).convert("1")),
        "transparent": file_of(clear),
        "transparent webp": file_of(clear, "WEBP", lossless=True),
        "white with an opaque alpha channel": file_of(Image.fromarray(np.dstack([white] * 3)).convert("RGBA")),
    }


@pytest.mark.parametrize("name", list(mask_files()))
def test_a_mask_keeps_what_it_does_not_name_to_the_bit(service: Service, name: str) -> None:
    edited = picture_in(service.edit(mask=mask_files()[name], restore_size=True))
    assert np.array_equal(edited[:, :8], pixels()[:, :8])
    assert far_apart(edited[:, 8:], pixels()[:, 8:]) > 20


def test_a_mask_holds_at_a_size_that_is_not_the_models(service: Service) -> None:
    picture = pixels(4, 50, 30)
    edited = picture_in(service.edit(file_of(picture), mask=mask_files(50, 30)["white"], restore_size=True))
    assert np.array_equal(edited[:, :25], picture[:, :25])
    assert far_apart(edited[:, 25:], picture[:, 25:]) > 20


# ---- formats


@pytest.mark.parametrize(
    ("fields", "found", "lossless"),
    [
        ({}, "PNG", True), ({"output_format": "webp", "output_compression": 100}, "WEBP", True),
        ({"output_format": "webp"}, "WEBP", False), ({"output_format": "jpeg"}, "JPEG", False),
    ],
)  # fmt: skip
def test_results_come_in_the_format_that_was_asked_for(service: Service, fields, found: str, lossless: bool) -> None:
    answer = service.edit(num_inference_steps=1, guidance_scale=0, image_guidance_scale=0, **fields)
    (file,) = files_in(answer)
    assert answer.json()["output_format"] == fields.get("output_format", "png")
    with Image.open(io.BytesIO(file)) as picture:
        assert picture.format == found
    plain = picture_in(service.edit(num_inference_steps=1, guidance_scale=0, image_guidance_scale=0))
    difference = np.abs(decode_image(file).astype(int) - plain)
    assert (difference.max() <= 1) if lossless else (1 < difference.mean() < 40)


def test_compression_makes_files_smaller(service: Service) -> None:
    large, small = (
        len(files_in(service.edit(size="64x64", output_format="jpeg", output_compression=quality))[0])
        for quality in (100, 5)
    )
    assert small < large / 2


def test_whoever_accepts_pictures_gets_the_bytes_of_one(service: Service) -> None:
    answer = service.edit(headers={"accept": "image/webp"}, output_format="webp", output_compression=100, seed=5)
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-ip2p-seed"] == "5"
    assert far_apart(decode_image(answer.content), picture_in(service.edit(seed=5))) <= 1


def test_an_error_is_json_even_for_whoever_accepts_pictures(service: Service) -> None:
    answer = service.edit(headers={"accept": "image/png"}, seed=-1)
    assert answer.headers["content-type"] == "application/json"


# ---- what a file tells


REPEATABLE: dict[str, dict[str, typing.Any]] = {
    "the defaults": {},
    "everything about the steps": {
        "prompt": 'say "ünïcode" 🌙', "negative_prompt": "snow", "num_inference_steps": 7, "sampler": "dpmpp_2m",
        "guidance_scale": 4.5, "image_guidance_scale": 1.75, "guidance_start": 0.25, "guidance_end": 0.75, "seed": 77,
    },
    "another resolution": {"resolution": 24},
    "the size of the input": {"restore_size": True, "resolution": 24},
    "a size": {"size": "24x32"},
}  # fmt: skip


def fields_told_by(file: bytes) -> dict[str, typing.Any]:
    """The fields of a form that repeats the edit whose result ``file`` is."""
    told = json.loads(carried_text(file))
    names = {"instruction": "prompt", "steps": "num_inference_steps"}
    fields = {names.get(name, name): value for name, value in told.items()}
    fields["guidance_start"], fields["guidance_end"] = fields.pop("guidance_interval")
    for name in ("software", "digital_source_type", "unet_sha256"):
        assert fields.pop(name)
    if isinstance(fields.get("size"), list):
        fields["size"] = "x".join(map(str, fields["size"]))
    return fields


@pytest.mark.parametrize("name", list(REPEATABLE))
def test_a_file_tells_all_that_repeats_its_edit(service: Service, name: str) -> None:
    source = file_of(pixels(6, 40, 28))
    (file,) = files_in(service.edit(source, **{"seed": None, **REPEATABLE[name]}))
    assert far_apart(picture_in(service.edit(source, **fields_told_by(file))), decode_image(file)) <= 1


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_a_file_of_every_format_tells_the_same(service: Service, image_format: str) -> None:
    asked = REPEATABLE["everything about the steps"]
    (file,), (plain,) = files_in(service.edit(output_format=image_format, **asked)), files_in(service.edit(**asked))
    assert carried_text(file) == carried_text(plain)


def test_a_file_says_which_weights_made_it_and_that_a_model_did(service: Service, edit_model) -> None:
    (file,) = files_in(service.edit())
    told = json.loads(carried_text(file))
    assert told["unet_sha256"] == edit_model.sha256["unet"]
    assert told["digital_source_type"] == "trainedAlgorithmicMedia"
    assert told["model"] == "tiny"


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_where_a_photo_was_taken_is_not_in_the_result(service: Service, image_format: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 51.0, 24.0)
    exif[ExifTags.Base.Artist] = "Somebody Known"
    source = file_of(pixels(1), "JPEG", exif=exif, comment=b"taken at home")
    assert b"Somebody Known" in source
    (file,) = files_in(service.edit(source, output_format=image_format))
    with Image.open(io.BytesIO(file)) as picture:
        assert not picture.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        assert set(picture.getexif()) <= {ExifTags.Base.ImageDescription}
    assert b"Somebody" not in file
    assert b"at home" not in file


def test_a_result_can_be_edited_again(service: Service) -> None:
    (file,) = files_in(service.edit(output_format="webp"))
    assert picture_in(service.edit(file)).shape == (16, 16, 3)
