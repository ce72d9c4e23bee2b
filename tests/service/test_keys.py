"""A server with keys: every path asks for one, nobody learns of them, and several are valid at a time."""

from __future__ import annotations

import base64
import hashlib
import logging
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from serving import EDITS, PICTURE, Command, Service, error_in, files_in, serving
from starlette.routing import Mount

pytestmark = pytest.mark.service

KEYS = ("first-key-2b1e", "second-key-9c4d", "schlüssel-für-alle")
OPEN = {"/healthz", "/readyz"}


@pytest.fixture(scope="module")
def locked(edit_folder: Path) -> Iterator[Service]:
    digests = frozenset(hashlib.sha256(key.encode()).digest() for key in KEYS)
    with serving(edit_folder, key=KEYS[0], key_digests=digests) as made:
        yield made


def routes_of(routes: typing.Iterable[typing.Any]) -> Iterator[tuple[str, str]]:
    """Method and path of everything that answers, inside included routers and mounted applications too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router.routes)
        elif isinstance(route, Mount):
            yield ("GET", f"{route.path}/anything")
        else:
            yield from ((method, route.path) for method in sorted(route.methods))


def basic(key: str, name: str = "anybody") -> str:
    return "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()


def authorized(service: Service, authorization: str | bytes | None, path: str = "/v1/models") -> requests.Response:
    headers = {} if authorization is None else {"authorization": authorization}
    return requests.get(service.url + path, headers=headers, timeout=30)


def test_every_route_asks_for_a_key(locked: Service) -> None:
    found = list(routes_of(locked.server.config.app.routes))  # type: ignore[union-attr]
    found += [("GET", "/"), ("GET", "/index.html"), ("GET", "/nothing"), ("POST", "/")]
    assert {path for _, path in found} >= {EDITS, "/metrics", "/openapi.json", "/v1/edits/{name}/cancel", "/", *OPEN}
    for method, path in found:
        answer = requests.request(method, locked.url + path.replace("{name}", "tiny"), timeout=30)
        if path in OPEN:
            assert answer.status_code == 200
            continue
        assert (answer.status_code, path) == (401, path)
        assert "Basic" in answer.headers["www-authenticate"]
        if method != "HEAD":
            error = error_in(answer)
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "PROPFIND", "HEAD"])
@pytest.mark.parametrize("path", [EDITS, "/nothing", "/healthz/", "//healthz", "/%68ealthz/../v1/models", "/readyz/x"])
def test_no_other_way_in_is_open(locked: Service, method: str, path: str) -> None:
    connection = locked.connected(path, {"authorization": "none", "connection": "close"}, b"", method)
    said = connection.recv(100)
    connection.close()
    assert said.split()[1] == b"401"


def test_a_health_check_says_nothing_of_the_server(locked: Service) -> None:
    assert authorized(locked, None, "/healthz").json() == {"status": "alive"}
    assert authorized(locked, None, "/readyz").json() == {"status": "READY"}


@pytest.mark.parametrize("key", KEYS[:2])
def test_each_key_opens_both_ways(locked: Service, key: str) -> None:
    for authorization in (f"Bearer {key}", f"bearer  {key} ", basic(key), basic(key, "").replace("Basic", "BASIC")):
        assert authorized(locked, authorization).status_code == 200, authorization


def test_a_key_beyond_ascii_opens_both_ways(locked: Service) -> None:
    assert authorized(locked, basic(KEYS[2])).status_code == 200
    assert authorized(locked, f"Bearer {KEYS[2]}".encode()).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer wrong", "Bearer", "Bearer ", "", KEYS[0], f"Bearer {KEYS[0][:-1]}", f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0].upper()}", f"Bearer {','.join(KEYS[:2])}", f"Token {KEYS[0]}", "Basic", "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(), "Basic " + base64.b64encode(KEYS[0].encode()).decode(),
        basic("wrong"), basic("", KEYS[0]), f"Bearer {hashlib.sha256(KEYS[0].encode()).hexdigest()}",
        b"Bearer \xff\xe9",
    ],
    ids=repr,
)  # fmt: skip
def test_a_wrong_key_is_refused(locked: Service, authorization: str | bytes) -> None:
    assert error_in(authorized(locked, authorization), 401)["code"] == "invalid_api_key"


def test_a_key_in_the_address_does_not_open(locked: Service) -> None:
    assert authorized(locked, None, f"/v1/models?key={KEYS[0]}&api_key={KEYS[0]}").status_code == 401


def test_edits_are_made_for_whoever_has_a_key(locked: Service) -> None:
    assert files_in(locked.edit())
    assert error_in(locked.edit(headers={"authorization": "Bearer wrong"}), 401)


def test_a_large_body_without_a_key_still_gets_its_answer(locked: Service) -> None:
    answer = locked.edit(PICTURE + bytes(8 * 2**20), headers={"authorization": "Bearer wrong"})
    assert error_in(answer, 401)
    assert files_in(locked.edit())


def test_an_open_server_asks_nobody(service: Service) -> None:
    assert authorized(service, None).status_code == 200
    assert authorized(service, "Bearer whatever").status_code == 200


def test_keys_and_names_of_users_are_not_in_the_log(locked: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.edit(user="alice@example.org", prompt="my secret garden")
        authorized(locked, f"Bearer {KEYS[1]}", f"/v1/models?key={KEYS[0]}")
        authorized(locked, basic(KEYS[1]), f"/nothing/{KEYS[0]}")
        authorized(locked, f"Bearer {KEYS[0]}x")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("ip2p")]
    assert len(lines) >= 4
    said = "\n".join(lines)
    assert " user=" in said
    for private in (*KEYS, basic(KEYS[1])[6:], "alice", "secret garden"):
        assert private not in said


def test_the_command_never_writes_its_key_down(command: Command) -> None:
    assert command.key
    assert command.edit().status_code == 200
    assert command.get(f"/v1/edits/{command.key}").status_code == 404
    assert command.edit(headers={"authorization": f"Bearer {command.key}x"}).status_code == 401
    assert command.edit(seed=-1).status_code == 400
    said = command.log.read_text()
    assert all(f" {status} " in said for status in (200, 400, 401, 404))
    assert command.key not in said
