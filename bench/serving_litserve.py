"""diffusers behind LitServe with its batching, grouped by steps and scales: a side of bench/serving.py.

python bench/serving_litserve.py PORT THREADS
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import litserve

from bench.serving_peers import BATCH, WAIT_S, Diffusers, Job


class EditApi(litserve.LitAPI):
    """One edit a request, in the JSON of bench/serving_peers.py; a request without a prompt asks for the row count."""

    def __init__(self, threads: int):
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT_S)
        self.threads = threads

    def setup(self, device: str) -> None:
        self.diffusers = Diffusers(self.threads)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads the types
        return request

    def batch(self, inputs: list[Job]) -> list[Job]:
        return inputs

    def predict(self, jobs: list[Job]) -> list[Job]:
        edited = iter(self.diffusers.edit_grouped([job for job in jobs if "prompt" in job]))
        return [next(edited) if "prompt" in job else {"rows": self.diffusers.rows} for job in jobs]

    def unbatch(self, output: list[Job]) -> list[Job]:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return output


if __name__ == "__main__":
    server = litserve.LitServer(EditApi(int(sys.argv[2])), accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False)
