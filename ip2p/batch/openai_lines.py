"""OpenAI's batch format: one request a line in, and what answers it out.

A line names its edit in ``custom_id`` and holds the body of a request to /v1/images/edits. Its answer is a line of the
output file or, where it failed, of the error file. One job has one model, so a line's ``model`` is not looked at.
"""

from __future__ import annotations

import base64
import json
import typing
from collections.abc import Mapping

from ip2p.errors import InputError

URL = "/v1/images/edits"
OURS = {"prompt": "instruction", "images": "image", "num_inference_steps": "steps"}
ASKS_NOTHING = {"n": (1,), "response_format": ("b64_json",), "background": ("auto", "opaque"), "quality": ("auto",)}
NOT_LOOKED_AT = ("model", "user")


def is_openai_line(values: Mapping[str, object]) -> bool:
    return "custom_id" in values and "body" in values


def values_of(line: Mapping[str, object]) -> dict[str, object]:
    """The request of a line, in the fields of a manifest. Raises InputError for what is not understood."""
    body = line["body"]
    if line.get("method", "POST") != "POST" or line.get("url", URL) != URL:
        raise InputError(f"found {line.get('method')} {line.get('url')}, expected POST {URL}")
    if not isinstance(body, dict):
        raise InputError(f"body is not an object but {type(body).__name__}")
    values: dict[str, object] = {"id": line["custom_id"]}
    for name, value in typing.cast(dict[str, object], body).items():
        field = OURS.get(name, name)
        if field in values:
            raise InputError(f"{field} is given twice")
        if name in ASKS_NOTHING and value not in ASKS_NOTHING[name]:
            wanted = " or ".join(map(str, ASKS_NOTHING[name]))
            raise InputError(f"{name} must be {wanted}, got {str(value)[:40]!r}")
        if field in ("image", "mask"):
            values[field] = _picture(name, value)
        elif name not in ASKS_NOTHING and name not in NOT_LOOKED_AT:
            values[field] = value
    return values


def _picture(name: str, value: object) -> object:
    """The one picture's URI, however it is wrapped."""
    if isinstance(value, list):
        if len(value) != 1:
            raise InputError(f"{name} holds {len(value)} pictures; one is edited at a time")
        value = value[0]
    if isinstance(value, dict):
        if "image_url" not in value:
            raise InputError(f"{name} has no image_url; files that were uploaded elsewhere are not here")
        value = value["image_url"]
        value = value.get("url") if isinstance(value, dict) else value
    return value


def answer_line(record: Mapping[str, typing.Any], picture: bytes | None) -> str:
    """The line that answers the edit of ``record``: with ``picture`` for the output file, else for the error file."""
    line: dict[str, typing.Any] = {"id": f"batch_req_{record['key']}", "custom_id": record["id"]}
    if picture is not None:
        body = {"created": record["ended_at"], "data": [{"b64_json": base64.b64encode(picture).decode()}]}
        line["response"] = {"status_code": 200, "request_id": record["key"], "body": body}
        line["error"] = None
    else:
        line["response"] = None
        line["error"] = {"code": record["error"]["code"], "message": record["error"]["message"]}
    return json.dumps(line)
