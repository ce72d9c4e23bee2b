"""A server does the edits: what is sent to it, and what becomes of each of its answers."""

from __future__ import annotations

import base64
import email.parser
import email.policy
import http.server
import json
import socket
import threading
import time
import typing
from collections.abc import Iterator

import numpy as np
import pytest
from small_batch import pixels

from ip2p.batch.editing import CopyEditing, ServerEditing, model_id
from ip2p.batch.failures import FATAL, OWN, PASSING, meaning_of
from ip2p.editing.edit_request import EditRequest
from ip2p.errors import EditError, InputError, StorageError
from ip2p.images import decode_image, encode_image
from ip2p.pictures import decode_mask

Answer = tuple[int, dict[str, str], bytes]


class EditServer:
    """Gives its answers one after the other, the last of them for ever, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[dict[str, typing.Any]] = []
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []
        edits = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                edits.paths.append(self.path)
                edits.heads.append({name.lower(): value for name, value in self.headers.items()})
                edits.asked.append(form_of(self.headers["content-type"], body))
                status, headers, data = edits.answers.pop(0) if len(edits.answers) > 1 else edits.answers[0]
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def form_of(kind: str, body: bytes) -> dict[str, typing.Any]:
    """A form's texts and files by name; each name comes once."""
    head = f"content-type: {kind}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    form: dict[str, typing.Any] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        assert name not in form
        data = part.get_payload(decode=True)
        form[name] = data if part.get_filename() else data.decode()
    return form


def picture_answer(picture: np.ndarray) -> Answer:
    data = [{"b64_json": base64.b64encode(encode_image(picture)).decode()}]
    return 200, {}, json.dumps({"created": 1, "data": data}).encode()


def refusal(status: int, message: str = "said the server", **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, names, json.dumps({"error": {"message": message, "code": "c", "type": "t", "param": None}}).encode()


@pytest.fixture
def server() -> Iterator[EditServer]:
    made = EditServer()
    yield made
    made.close()


@pytest.fixture
def editing(server: EditServer) -> Iterator[ServerEditing]:
    made = ServerEditing(server.url, timeout_s=10)
    yield made
    made.close()


REQUEST = EditRequest(image=pixels(), instruction="make it night", steps=7, seed=3, batch=True)


def test_the_servers_picture_is_the_edit(server, editing):
    server.answers = [picture_answer(pixels(5, 24, 16))]
    assert np.array_equal(editing.edit(REQUEST), pixels(5, 24, 16))
    assert server.paths == ["/v1/images/edits"]
    assert "authorization" not in server.heads[0]
    assert editing.row_evals == 0


def test_every_field_of_a_request_arrives(server, editing):
    server.answers = [picture_answer(pixels())]
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    request = EditRequest(
        image=pixels(), instruction="make it »night«\u2603", steps=7, guidance_scale=0.0, image_guidance_scale=1.25,
        seed=0, negative_prompt="day", sampler="dpmpp_2m", resolution=64, restore_size=True, mask=mask, batch=True,
    )  # fmt: skip
    editing.edit(request)
    (form,) = server.asked
    image, sent_mask = form.pop("image"), form.pop("mask")
    assert np.array_equal(decode_image(image), pixels())
    assert np.array_equal(decode_mask(sent_mask), mask)
    assert form == {
        "prompt": "make it »night«\u2603", "num_inference_steps": "7", "seed": "0", "guidance_scale": "0.0",
        "image_guidance_scale": "1.25", "negative_prompt": "day", "sampler": "dpmpp_2m", "resolution": "64",
        "priority": "batch", "restore_size": "true",
    }  # fmt: skip


def test_what_nobody_asked_for_is_left_to_the_server(server, editing):
    server.answers = [picture_answer(pixels())]
    editing.edit(REQUEST)
    assert set(server.asked[0]) == {"image", "prompt", "num_inference_steps", "seed", "sampler", "priority"}


def test_a_size_is_sent_as_width_and_height(server, editing):
    server.answers = [picture_answer(pixels())]
    editing.edit(EditRequest(image=pixels(), instruction="x", size=(64, 48)))
    assert server.asked[0]["size"] == "64x48"


def test_what_is_sent_is_understood_by_the_projects_own_form(server, editing):
    from serve.form import edit_requests, read_form
    from serve.settings import Settings

    server.answers = [picture_answer(pixels())]
    mask = np.full((16, 16), 255, np.uint8)
    mask[3:7] = 0
    request = EditRequest(
        image=pixels(), instruction="make it night", steps=7, guidance_scale=2.5, image_guidance_scale=1.25, seed=9,
        negative_prompt="day", sampler="dpmpp_2m", size=(64, 48), mask=mask, batch=True,
    )  # fmt: skip
    editing.edit(request)
    settings = Settings(models={"tiny": ""}, max_edit_pixels=64 * 64)
    form = read_form(list(server.asked[0].items()), settings)
    (read,) = edit_requests(form, settings, form.seed)
    for name, value in vars(request).items():
        assert np.array_equal(getattr(read, name), value), name


def test_the_key_is_sent_as_a_bearer(server):
    server.answers = [picture_answer(pixels())]
    ServerEditing(f"{server.url}/", "sesame").edit(REQUEST)
    assert server.heads[0]["authorization"] == "Bearer sesame"
    assert server.paths == ["/v1/images/edits"]


def test_a_server_that_is_full_is_asked_again_when_it_says(server, editing):
    server.answers = [
        refusal(429, retry_after_ms="150"), refusal(429, retry_after_ms="0"), refusal(429, retry_after_ms="1.5"),
        picture_answer(pixels(5)),
    ]  # fmt: skip
    began = time.monotonic()
    assert np.array_equal(editing.edit(REQUEST), pixels(5))
    assert time.monotonic() - began >= 0.15
    assert len(server.asked) == 4
    assert server.asked[0] == server.asked[3]


@pytest.mark.parametrize(
    ("status", "kind", "meaning"),
    [
        (400, InputError, OWN),
        (404, InputError, OWN),
        (413, InputError, OWN),
        (415, InputError, OWN),
        (401, StorageError, FATAL),
        (403, StorageError, FATAL),
        (500, EditError, PASSING),
        (408, EditError, PASSING),
        (302, EditError, PASSING),
    ],
)
def test_each_refusal_is_the_error_that_says_what_to_do_next(server, editing, status, kind, meaning):
    server.answers = [refusal(status)]
    with pytest.raises(kind, match="said the server") as caught:
        editing.edit(REQUEST)
    assert meaning_of(caught.value, "edit") == meaning
    assert len(server.asked) == 1


def test_a_key_that_is_refused_says_where_to_put_the_right_one(server, editing):
    server.answers = [refusal(401)]
    with pytest.raises(
        StorageError, match=r"the server refused the key \(said the server\); set IP2P_API_KEY"
    ) as caught:
        editing.edit(REQUEST)
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_that_cannot_now_is_away(server, editing, status):
    server.answers = [refusal(status)]
    with pytest.raises(StorageError, match=f"{server.url}: said the server") as caught:
        editing.edit(REQUEST)
    assert caught.value.kind == "away"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"error": "words"}', b'{"error": null}', b"\xff"])
def test_a_refusal_in_other_words_is_told_by_its_number(server, editing, body):
    server.answers = [(503, {}, body)]
    with pytest.raises(StorageError, match="HTTP 503") as caught:
        editing.edit(REQUEST)
    assert caught.value.kind == "away"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"data": []}', b'{"data": [{"b64_json": "###"}]}'])
def test_an_answer_that_holds_no_picture_may_be_another_next_time(server, editing, body):
    server.answers = [(200, {}, body)]
    with pytest.raises(Exception) as caught:  # noqa: PT011  what matters is what it means
        editing.edit(REQUEST)
    assert meaning_of(caught.value, "edit") == PASSING


def test_a_picture_of_the_server_that_is_damaged_is_not_the_items_fault(server, editing):
    data = base64.b64encode(encode_image(pixels())[:100]).decode()
    server.answers = [(200, {}, json.dumps({"data": [{"b64_json": data}]}).encode())]
    with pytest.raises(Exception) as caught:  # noqa: PT011  what matters is what it means
        editing.edit(REQUEST)
    assert meaning_of(caught.value, "edit") == PASSING


def test_nobody_at_the_address_is_a_server_that_is_away():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(StorageError, match="cannot reach the server") as caught:
            ServerEditing(url).edit(REQUEST)
    assert caught.value.kind == "away"


def test_an_answer_that_breaks_off_is_a_server_that_is_away(server, editing):
    status, _, data = picture_answer(pixels())
    server.answers = [(status, {"content-length": str(len(data) + 10), "connection": "close"}, data)]
    with pytest.raises(StorageError, match="cannot reach the server") as caught:
        editing.edit(REQUEST)
    assert caught.value.kind == "away"


def test_an_address_that_is_none_is_no_outage():
    # Of --via-serve localhost:8000, the whole job would wait for --outage.
    with pytest.raises(Exception) as caught:  # noqa: PT011  what matters is what it means
        ServerEditing("localhost:8000").edit(REQUEST)
    assert getattr(caught.value, "kind", "") != "away"


def test_many_edits_are_asked_for_at_a_time(server, editing):
    line = threading.Barrier(8)
    status, headers, data = picture_answer(pixels())

    class Together(list):
        def __len__(self) -> int:
            line.wait(10)
            return 1

    server.answers = Together([(status, headers, data)])
    threads = [threading.Thread(target=editing.edit, args=(REQUEST,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(server.asked) == 8
    assert not line.broken


def test_a_copy_is_the_picture_itself():
    assert CopyEditing().edit(REQUEST) is REQUEST.image
    assert CopyEditing().row_evals == 0
    CopyEditing().close()


# ---- what edits


def test_the_id_of_what_edits_says_all_that_decides_results():
    base = model_id({"unet": "1", "vae": "2"}, "float32", 24)
    assert base == model_id({"vae": "2", "unet": "1"}, "float32", 24)
    assert len(base) == 16
    others = [
        model_id({"unet": "1", "vae": "3"}, "float32", 24), model_id({"unet": "1"}, "float32", 24),
        model_id({"unet": "2", "vae": "1"}, "float32", 24), model_id({"unet": "1", "vae": "2"}, "bfloat16", 24),
        model_id({"unet": "1", "vae": "2"}, "float32", 25),
    ]  # fmt: skip
    assert len({base, *others}) == 6
