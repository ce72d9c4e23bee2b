"""The ledger of a finished run, which of the library itself ``verify`` alone reads."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from ip2p.dataset.manifest import read_listed, read_manifest, table_files
from ip2p.dataset.tables import read_parquet_bytes
from ip2p.storage import Folder


def iterate_ledger(folder: Folder) -> Iterator[dict[str, typing.Any]]:
    """Its rows one by one, in the order of the shards."""
    files = read_manifest(folder)
    for name in table_files(files, "ledger"):
        yield from read_parquet_bytes(read_listed(folder, name, files[name]), name).to_pylist()
