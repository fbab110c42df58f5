"""Runs what pages mark with <!-- run -->, in its order, in an empty folder a page: Python, recipes, commands.

<!-- run: with FLAGS --> gives the block's `prunus run` more flags, which make it short. The rest of what pages show is
checked by `tests/laws/test_docs.py`: Python runs there, other commands say why they are not run, and are read up to the
work. `python -m tests.pages` runs all pages, with paths those.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"^<!-- run(?:: with ([^\n]+))? -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def run_page(text: str) -> None:
    """The marked blocks of a page, here; a recipe is recipe.yaml to the commands below it."""
    names = {"__name__": "__page__"}
    for flags, language, body in MARKED.findall(text):
        if language == "python":
            exec(compile(body, "<page>", "exec"), names)
        elif language == "yaml":
            Path("recipe.yaml").write_text(body, encoding="utf-8")
        else:
            for line in re.findall(r"^\$ prunus (.+)$", body, re.MULTILINE):
                line = f"{line} {flags}" if line.startswith("run ") else line
                subprocess.run(f"{sys.executable} -m prunus.run.cli {line}", shell=True, check=True)


def main() -> None:
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if MARKED.search(text):
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                run_page(text)
                os.chdir(ROOT)
            sys.stdout.write(f"{page.relative_to(ROOT)} runs: {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
