"""A server of completions as the net has them: slow, overloaded, failing, garbled or empty every now and then.

What happens to a request is decided by a hash of its prompt and how often it has come, so that a test knows it.
``python -m tests.unit.triplets.faulty_server PORT MODEL`` puts a language model behind it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("ok", "ok", "ok", "ok", "slow", "429", "500", "malformed", "empty", "unparseable")
PROMPT_TOKENS, COMPLETION_TOKENS = 20, 30


def scripted(prompt: str) -> str:
    """A usable completion for any caption."""
    caption = prompt.partition("\n")[0]
    return f"add a blue lantern\n%%\n{caption} with a blue lantern\nEND"


def fault_of(prompt: str, times: int) -> str:
    """One of FAULTS for the ``times``-th request with this prompt, from 0."""
    digest = hashlib.blake2b(f"{prompt}|{times}".encode(), digest_size=2).digest()
    return FAULTS[int.from_bytes(digest, "big") % len(FAULTS)]


class FaultyServer:
    """Listens on ``port`` (0: any). ``asked`` counts requests by prompt, ``answered`` whole answers with their text."""

    def __init__(
        self, answer: Callable[[str], str] = scripted, port: int = 0, slow_s: float = 0.3, faults: bool = True
    ):
        self.answer, self.slow_s, self.faults = answer, slow_s, faults
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.by_fault: Counter[str] = Counter()
        self.keys: dict[str, list[str]] = {}  # Idempotency-Key to prompts
        self.billed_tokens = [0, 0]
        self.gate = threading.Event()  # requests wait until it is set
        self.gate.set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    def _reply(self, prompt: str, key: str) -> tuple[int, dict[str, str], bytes]:
        with self.lock:
            fault = fault_of(prompt, self.asked[prompt]) if self.faults else "ok"
            self.asked[prompt] += 1
            self.by_fault[fault] += 1
            self.keys.setdefault(key, []).append(prompt)
        self.gate.wait()
        if fault == "429":
            return 429, {"Retry-After": "0.2"}, b'{"error": "slow down"}'
        if fault == "500":
            return 500, {}, b"oops"
        if fault == "slow":
            time.sleep(self.slow_s)
        with self.lock:
            self.billed_tokens[0] += PROMPT_TOKENS
            self.billed_tokens[1] += COMPLETION_TOKENS
        if fault == "malformed":
            return 200, {}, b'{"choices": [{"te'
        text = {"empty": "", "unparseable": "I am sorry, I cannot do that."}.get(fault) or (
            "" if fault == "empty" else self.answer(prompt)
        )
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
        return 200, {}, json.dumps({"choices": [{"text": text}], "usage": usage}).encode()

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = self.headers.get("Idempotency-Key", "")
                status, headers, data = server._reply(body["prompt"], key)
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                    self.wfile.flush()
                except OSError:
                    return  # who asked is gone
                if status == 200 and not data.endswith(b'"te'):
                    with server.lock:
                        server.answered[key] += 1

            def log_message(self, *args):
                pass

        return Handler


def main(port: str, model: str) -> None:
    from ip2p.config import Triplets
    from ip2p.triplets.language_model import LanguageModelWriter

    writer = LanguageModelWriter(model, Triplets(max_tokens=96), 0, "cpu")
    lock, count = threading.Lock(), [0]

    def answer(prompt: str) -> str:
        with lock:
            count[0] += 1
            return writer.complete([prompt], [("server", prompt, count[0])])[0] + "\nEND"

    server = FaultyServer(answer, int(port))
    print(server.url, flush=True)
    while sys.stdin.readline():  # each line asks for the counts
        counts = {
            "requests": sum(server.asked.values()),
            "prompts": len(server.asked),
            "by_fault": dict(server.by_fault),
        }
        counts |= {"answered_twice": sum(n > 1 for n in server.answered.values()), "billed": server.billed_tokens}
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
