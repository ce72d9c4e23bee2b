"""May we read, write, list and delete below an S3 prefix, and does the store keep its conditions?"""

from __future__ import annotations

import secrets

from ip2p.doctor.finding import Finding, error, fine, warning
from ip2p.errors import StorageError
from ip2p.storage import open_folder


def check_store(uri: str) -> Finding:
    """Does what a job does, with one small file that it removes again."""
    name = f"doctor-{secrets.token_hex(8)}"
    deed = "reach"
    try:
        folder = open_folder(uri)
        deed = "write"
        folder.write(name, b"1")
        deed = "read"
        if folder.read(name) != b"1":
            return error("store", f"{uri}: gives back other bytes than were written", "use another store")
        deed = "list"
        if name not in folder.list(name):
            return error("store", f"{uri}: does not list what was just written", "use a store that is consistent")
        deed = "write under a condition"
        kept = folder.write_if(name, b"2") is None
        deed = "delete"
        folder.delete(name)
    except StorageError as refused:
        return error("store", f"cannot {deed}: {refused}", "see the message; a job's role needs get, put, list, delete")
    if not kept:
        remedy = "batch edits need conditional writes: use a store that has them"
        return warning("store", f"{uri}: writes over what If-None-Match protects", remedy)
    return fine("store", f"{uri}: reads, writes, lists, deletes, keeps conditions")
