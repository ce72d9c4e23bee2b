#!/usr/bin/env python3
"""The page as people see it, by a real Chromium: the shipped model edits a postcard, and a screenshot is kept.

python bench/page_picture.py --output docs/figures          # needs chromium (apt install chromium)
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def server() -> Iterator[str]:
    """``ip2p serve`` on a free port, ready."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        command = [sys.executable, "-m", "ip2p", "serve", "--port", "0"]
        with Path(log.name).open("w") as written:
            process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                found = re.search(r"running on (http://\S+)", Path(log.name).read_text())
                if found and _ready(found[1]):
                    yield found[1]
                    return
                time.sleep(0.2)
            raise TimeoutError(Path(log.name).read_text())
        finally:
            process.terminate()
            process.wait(30)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder (default %(default)s)")
    parser.add_argument("--postcard", type=int, default=3, help="which one is edited (default %(default)s)")
    parser.add_argument("--edit", default="make it a pencil sketch", help="the instruction (default %(default)r)")
    parser.add_argument("--seed", type=int, default=1, help="of the edit (default %(default)s)")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("error: no Chromium on this machine: apt install chromium", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    card = args.output / "postcard.png"
    drawn = ["postcard", "--quiet", "--seed", str(args.postcard), "--size", "64", "--output", str(card)]
    subprocess.run([sys.executable, "-m", "ip2p", *drawn], cwd=ROOT, check=True)
    with server() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(url)
        page.set_input_files("#file-input", card)
        page.fill("#instruction", args.edit)
        page.locator("#more-settings").evaluate("details => { details.open = true }")
        page.fill("#seed", str(args.seed))
        page.locator("#more-settings").evaluate("details => { details.open = false }")
        page.click("#edit-button")
        page.wait_for_selector("#stage[data-state=done]", timeout=60_000)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=args.output / "page.png")
        browser.close()
    card.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
