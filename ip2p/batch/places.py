"""What lies where in the output folder of a batch, beside the edited pictures."""

from __future__ import annotations

OURS = "_job/"
PARTS = f"{OURS}parts/"  # records, one file a chunk
ATTEMPTS = f"{OURS}attempts/"  # how often items were tried in vain
LEASE = f"{OURS}lease.json"  # who works on it
JOB = f"{OURS}job.json"  # what was asked
STATUS = f"{OURS}status.json"  # how far it is
PROBE = f"{OURS}probe"

RESULTS, FAILED_LINES, REJECTED = "results.jsonl", "failed.jsonl", "rejected.jsonl"
SUMMARY, SHEET = "summary.json", "contact_sheet.png"
ANSWERS, ERRORS = "output.jsonl", "error.jsonl"  # for a manifest in OpenAI's batch format
REPORTS = (RESULTS, FAILED_LINES, REJECTED, SUMMARY, SHEET, ANSWERS, ERRORS)


def is_taken(name: str) -> bool:
    """Whether a picture may not be called so."""
    return f"{name}/".startswith(OURS) or name in REPORTS
