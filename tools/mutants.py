"""Break the core in known ways, one at a time in a copy, and see that the tests notice: ``python tools/mutants.py``.

``tools/mutants.txt`` holds the mutants. One that no test of ``tests/core`` kills is printed, and the exit code is 1.
With words behind the command, only the mutants whose file or fault contains one of them. Takes a quarter of an hour.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
CORE: Final = Path("scheduler/penstock/scheduler/core")
TIMEOUT_S: Final = 120


class Mutant(NamedTuple):
    """One fault."""

    file: str
    """In CORE."""
    fault: str
    sound: str
    """What is there, once."""
    broken: str
    """What replaces it."""


def read_mutants(path: Path) -> list[Mutant]:
    """Those of the file. Raises ValueError for a line that is none."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [_mutant(line) for line in lines]


def _mutant(line: str) -> Mutant:
    parts = line.replace("\\n", "\n").split(" :: ")
    if len(parts) != len(Mutant._fields):
        raise ValueError(f"no mutant: {line}")
    return Mutant(*parts)


def kills(mutant: Mutant, place: Path) -> bool:
    """Whether a test fails with that fault in the copy at ``place``."""
    file = place / CORE / mutant.file
    source = file.read_text()
    if source.count(mutant.sound) != 1:
        raise SystemExit(f"{mutant.file}: {mutant.sound!r} occurs {source.count(mutant.sound)} times")
    file.write_text(source.replace(mutant.sound, mutant.broken))
    try:
        return _tests_fail(place)
    finally:
        file.write_text(source)


def _tests_fail(place: Path) -> bool:
    environment = os.environ | {"PYTHONPATH": str(place / "scheduler"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-xq", "-m", "not long", "-p", "no:cacheprovider", "tests/core"]
    try:
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main(words: list[str]) -> int:
    """Try the mutants; 1 if one lives, or if the tests fail without any. Every one's text must occur once."""
    mutants = [
        mutant
        for mutant in read_mutants(Path(__file__).with_suffix(".txt"))
        if not words or any(word in f"{mutant.file} {mutant.fault}" for word in words)
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("scheduler", "tests", "pyproject.toml"):
            copy = shutil.copy2 if (ROOT / name).is_file() else shutil.copytree
            copy(ROOT / name, place / name)
        if _tests_fail(place):
            print("the tests fail without any mutant", file=sys.stderr)
            return 1
        alive = [mutant for mutant in mutants if not kills(mutant, place)]
    for mutant in alive:
        print(f"alive: {mutant.fault} ({mutant.file})")
    print(f"{len(mutants) - len(alive)} of {len(mutants)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
