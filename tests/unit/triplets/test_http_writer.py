import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ip2p.config import Triplets
from ip2p.errors import RecipeError, WriterError
from ip2p.triplets import http_writer
from ip2p.triplets.http_writer import HttpWriter

KEY = "sk-very-secret"
GOOD = "make it night\n%%\na cat at night"


def reply(text=GOOD, status=200, headers=(), raw=None, delay_s=0.0):
    body = raw if raw is not None else json.dumps({"choices": [{"text": text}]}).encode()
    return status, dict(headers), body, delay_s


class Endpoint:
    """A real HTTP server: ``replies`` are used up in order, the last one stays; ``by_prompt`` goes first."""

    def __init__(self):
        self.replies, self.by_prompt, self.seen = [reply()], {}, []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer_to(self, path, body, headers):
        with self.lock:
            self.seen.append((path, body, headers))
            prompt = body.get("prompt")
            queue = self.by_prompt.get(prompt, self.replies)
            return queue.pop(0) if len(queue) > 1 else queue[0]

    def _handler(endpoint):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, data, delay_s = endpoint.answer_to(self.path, body, dict(self.headers))
                with endpoint.lock:
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                time.sleep(delay_s)
                with endpoint.lock:
                    endpoint.at_once -= 1
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("IP2P_LM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def slept():
    return []


@pytest.fixture
def ask(endpoint, slept):
    def ask(prompts=("a cat\n##\n",), **options):
        triplets = Triplets(writer="http", http_url=endpoint.url, http_model="davinci")
        writer = HttpWriter(triplets, 7, **({"sleep": slept.append, "attempts": 3, "timeout_s": 5.0} | options))
        return writer.complete(list(prompts), [(f"id{i}", 0) for i in range(len(prompts))])

    return ask


def test_the_request_is_the_originals(endpoint, ask):
    assert ask() == [GOOD]
    ((path, body, headers),) = endpoint.seen
    assert path == "/v1/completions"
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    assert body == {
        "prompt": "a cat\n##\n", "model": "davinci", "temperature": 0.7, "max_tokens": 256, "top_p": 1.0,
        "frequency_penalty": 0.1, "presence_penalty": 0.0, "stop": ["\nEND"],
    }  # fmt: skip
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


def test_the_seed_belongs_to_run_row_and_try(endpoint):
    triplets = Triplets(http_url=endpoint.url + "/")
    for run, identity in ((7, ("a", 0)), (7, ("a", 0)), (7, ("a", 1)), (7, ("b", 0)), (8, ("a", 0))):
        HttpWriter(triplets, run).complete(["x"], [identity])
    first, again, *others = [body["seed"] for _, body, _ in endpoint.seen]
    assert first == again
    assert len({first, *others}) == 4
    assert endpoint.seen[0][0] == "/v1/completions"
    assert "model" not in endpoint.seen[0][1]


def test_the_key_is_sent_and_the_projects_own_variable_goes_first(endpoint, ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    ask()
    monkeypatch.setenv("IP2P_LM_API_KEY", KEY + "\n")
    ask()
    assert [headers["Authorization"] for _, _, headers in endpoint.seen] == ["Bearer other", f"Bearer {KEY}"]


def test_a_completion_is_cut_before_the_stop(endpoint, ask):
    endpoint.replies = [reply(GOOD + "\nEND\nmore")]
    assert ask() == [GOOD]


def test_answers_keep_the_order_of_the_prompts_and_several_are_asked_at_once(endpoint, ask):
    prompts = [f"p{i}" for i in range(12)]
    endpoint.by_prompt = {p: [reply(p.upper(), delay_s=0.2 if i == 0 else 0.1)] for i, p in enumerate(prompts)}
    assert ask(prompts, concurrency=4) == [p.upper() for p in prompts]
    assert 2 <= endpoint.most_at_once <= 4


def test_a_retry_after_is_waited_for(endpoint, ask, slept):
    endpoint.replies = [reply(status=429, headers={"Retry-After": "7"}), reply()]
    assert ask() == [GOOD]
    assert slept == [pytest.approx(7.0, abs=0.5)]


def test_without_retry_after_the_wait_doubles_and_is_jittered(endpoint, ask, slept):
    endpoint.replies = [reply(status=429), reply(status=503), reply(status=500), reply(status=502), reply()]
    assert ask(attempts=5) == [GOOD]
    for wait_s, middle_s in zip(slept, (1, 2, 4, 8), strict=True):
        assert 0.5 * middle_s <= wait_s <= 1.5 * middle_s
    assert len({wait_s / middle_s for wait_s, middle_s in zip(slept, (1, 2, 4, 8), strict=True)}) > 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [("5", 5.0), ("0", 0.0), ("-3", 0.0), ("86400", 60.0), ("soon", None), ("", None), (None, None), ("nan", None)],
)
def test_retry_after_is_read_with_care(value, expected):
    assert http_writer._retry_after_s(value) == expected


def test_retry_after_may_be_a_date():
    assert 20 < http_writer._retry_after_s(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    assert http_writer._retry_after_s(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0.0


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_an_endpoint_that_stays_away_stops_the_run(endpoint, ask, slept, status):
    endpoint.replies = [reply(status=status, raw=b"busy")]
    with pytest.raises(WriterError, match=f"HTTP {status} busy; asked 3 times; when it is back, run the same command"):
        ask()
    assert len(endpoint.seen) == 3
    assert len(slept) == 2


def test_a_slow_endpoint_is_asked_again_and_then_stops_the_run(endpoint, ask):
    endpoint.replies = [reply(delay_s=0.5), reply()]
    assert ask(timeout_s=0.1) == [GOOD]
    endpoint.replies = [reply(delay_s=0.5)]
    with pytest.raises(WriterError, match=r"no answer .*timed out"):
        ask(timeout_s=0.1, attempts=2)


def test_an_answer_that_is_cut_or_never_begun_is_asked_again(endpoint, ask):
    cut = reply(raw=b'{"choices": [{"text": "make it ni', headers={"Content-Length": "9999"})
    endpoint.replies = [reply(status=0), cut, reply()]
    assert ask() == [GOOD]
    assert len(endpoint.seen) == 3


def test_nobody_listening_stops_the_run_and_names_the_address(endpoint, ask):
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(WriterError, match=r"127\.0\.0\.1.*no answer .*refused"):
        ask()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "set IP2P_LM_API_KEY"), (403, "lacks the right"), (404, r"check triplets\.http_url"),
     (302, "put the final address"), (307, "put the final address")],
)  # fmt: skip
def test_refusals_that_no_retry_can_mend_stop_the_run_at_once(endpoint, ask, slept, monkeypatch, status, remedy):
    monkeypatch.setenv("IP2P_LM_API_KEY", KEY)
    said = f"wrong key {KEY} for you".encode()
    endpoint.replies = [reply(status=status, raw=said, headers={"Location": endpoint.url + "/elsewhere"})]
    with pytest.raises(WriterError, match=remedy) as caught:
        ask()
    assert len(endpoint.seen) == 1
    assert slept == []
    assert KEY not in str(caught.value)
    assert "wrong key *** for you" in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_server_refuses_costs_only_its_row(endpoint, ask, status):
    endpoint.by_prompt = {"bad": [reply(status=status, raw=b"too many tokens")]}
    good, bad = ask(["good", "bad"])
    assert good == GOOD
    assert isinstance(bad, WriterError)
    assert str(bad).endswith(f"HTTP {status} too many tokens")
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize(
    "answer",
    [
        reply(status=500), reply(raw=b"<html>"), reply(raw=b""), reply(raw=b"{}"), reply(raw=b'{"choices": []}'),
        reply(raw=b"[1]"), reply(raw=b'{"choices": [{"text": null}]}'), reply(raw=b"\xff\xfe"),
        reply(raw=b'{"choices": [{"text": "' + b"x" * (1 << 20) + b'"}]}'),
    ],
    ids=["500", "html", "nothing", "no choices", "empty choices", "list", "null", "not utf-8", "too big"],
)  # fmt: skip
def test_an_answer_that_cannot_be_used_is_asked_again_and_then_costs_only_its_row(endpoint, ask, answer):
    endpoint.by_prompt = {"bad": [answer, reply()], "worse": [answer]}
    good, mended, failed = ask(["good", "bad", "worse"])
    assert (good, mended) == (GOOD, GOOD)
    assert isinstance(failed, WriterError)
    assert "asked 3 times" in str(failed)


def test_an_empty_text_is_an_answer(endpoint, ask):
    endpoint.replies = [reply("")]
    assert ask() == [""]


def test_many_failed_rows_in_a_row_stop_the_run(endpoint, ask):
    endpoint.replies = [reply(status=400, raw=b"no such field: stop")]
    assert all(isinstance(answer, WriterError) for answer in ask([str(i) for i in range(15)]))
    with pytest.raises(WriterError, match=r"16 captions in a row got no answer; the last: .*no such field: stop"):
        ask([str(i) for i in range(16)])


def test_failed_rows_with_answers_in_between_do_not_stop_the_run(endpoint, ask):
    prompts = [("good" if i == 10 else f"bad{i}") for i in range(24)]
    endpoint.by_prompt = {"good": [reply()]}
    endpoint.replies = [reply(status=400)]
    assert sum(isinstance(answer, WriterError) for answer in ask(prompts)) == 23


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "file:///etc/passwd", "ftp://x/v1", "http://", "http://u:p@x"]
)
def test_a_url_that_cannot_be_used_is_refused(url):
    with pytest.raises(RecipeError, match=r"triplets\.http_url") as caught:
        HttpWriter(Triplets(http_url=url), 0)
    assert "u:p" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("IP2P_LM_API_KEY", "secret\nHost: evil")
    with pytest.raises(WriterError) as caught:
        HttpWriter(Triplets(http_url="http://127.0.0.1:1"), 0)
    assert "secret" not in str(caught.value)
