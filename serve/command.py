"""``ip2p serve``: the edit endpoint and its page in one process. Flags only."""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path

HELP = """Serve edits over HTTP, with a page at /.

  ip2p serve --port 8000                                    # the shipped model, on this machine only
  ip2p serve --model night=/models/night --model day=/models/day --keys keys.txt --host 0.0.0.0

  curl -F image=@in.png -F prompt="make it night" -H "Accept: image/png" -o out.png \\
      http://127.0.0.1:8000/v1/images/edits

Ready when GET /readyz answers 200. Several machines: serve deploy serve/config.yaml.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags to ``parser``."""
    from serve.settings import KEYS_VARIABLE, Settings

    default = Settings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, printed (default %(default)s)")
    parser.add_argument(
        "--model", action="append", metavar="NAME=DIR",
        help="diffusers folder and the name it is served under; the first is the default (default: the shipped one)",
    )  # fmt: skip
    parser.add_argument("--models-held", type=int, default=default.models_held, help="in memory (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=default.dtype)
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1, … (default %(default)s)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE",
        help=f"keys that open the server, one a line; also {KEYS_VARIABLE}, with commas (default: it is open)",
    )  # fmt: skip
    parser.add_argument("--check", metavar="MODULE:FUNCTION", help="called with every picture; a reason refuses it")
    parser.add_argument(
        "--queue-limit", type=float, default=default.queue_limit_s, metavar="SECONDS",
        help="work that may wait before edits are refused with 429 (default %(default)s s)",
    )  # fmt: skip
    parser.add_argument("--default-steps", type=int, default=default.default_steps, help="(default %(default)s)")
    parser.add_argument("--max-steps", type=int, default=default.max_steps, help="(default %(default)s)")
    parser.add_argument("--max-body", type=int, default=default.max_body_bytes, help="bytes (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; edits that were taken in are finished. Raises an Ip2pError for bad flags."""
    import torch
    import uvicorn

    from serve.http import create_app

    settings = settings_of(args)
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    config = uvicorn.Config(
        create_app(settings), args.host, args.port, log_level="info", access_log=False, timeout_keep_alive=30,
        server_header=False, log_config=LOGGING,
    )  # fmt: skip
    # uvicorn raises again the signal that ended it, for whoever handled it before: here nobody has to die of it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()
    return 0


def settings_of(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The flags as Settings."""
    from serve.settings import Settings, load_check, named_model, read_keys

    chosen = {
        "dtype": args.dtype, "device": args.device, "models_held": args.models_held,
        "key_digests": read_keys(args.keys), "default_steps": args.default_steps, "max_steps": args.max_steps,
        "max_body_bytes": args.max_body, "queue_limit_s": args.queue_limit,
        "picture_check": load_check(args.check) if args.check else None,
    }  # fmt: skip
    if args.model:
        chosen["models"] = dict(named_model(one, f"--model {one}: expected NAME=DIR") for one in args.model)
    return Settings(**chosen)


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("uvicorn", "ip2p.serve")
    },
}
