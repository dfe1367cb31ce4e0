"""Write `docs/configuration.md` from what the commands say of themselves; with `--check`, only compare."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
COMMANDS = ("serve", "service", "scheduler", "generate", "trace", "demo")
HEAD = """\
# Configuration

Each command has one set of typed settings. A flag wins over its `PENSTOCK_*` variable, a variable over the default;
`--set KEY=VALUE` is another way to write a flag. Unknown keys and contradictions end the process with one line and exit
code 2. `--print-config` shows the resolved settings and where each comes from; secrets are masked.

`penstock serve` passes a `--set` whose key is not its own to the role that has it, such as
`penstock serve --set max_sequences=16`. Keys of callers are best given in a variable, since every user of a machine
can read a command line.
"""


def main(arguments: list[str]) -> int:
    """Write the page or compare it; 1 if it is out of date."""
    text = page()
    if arguments != ["--check"]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"error: {PAGE} is out of date: run python tools/document_settings.py", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The page as it should be."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        helps = list(pool.map(help_of, COMMANDS))
    sections = [f"\n## penstock {name}\n\n```text\n{said}```\n" for name, said in zip(COMMANDS, helps, strict=True)]
    return HEAD + "".join(sections)


def help_of(command: str) -> str:
    """What `--help` prints, at a fixed width and without this machine's environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    done = subprocess.run(
        [sys.executable, "-m", "penstock.local.main", command, "--help"],
        env={**kept, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
