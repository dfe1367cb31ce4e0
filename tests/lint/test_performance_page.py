"""`docs/performance.md` says what `bench/results/` holds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def table(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = [sys.executable, str(root / "tools" / "performance_table.py"), *arguments]
    return subprocess.run(tool, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the tool reads and writes, apart from the repository."""
    for path in ("tools/performance_table.py", "docs/performance.md"):
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    return tmp_path


def test_the_page_is_written_from_the_results() -> None:
    done = table(ROOT, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_figure_is_noticed_and_written(copy: Path) -> None:
    result = copy / "bench" / "results" / "link.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "tokens_per_s": 12_345.6}))
    assert table(copy, "--check").returncode == 1
    assert table(copy).returncode == 0
    assert "12,346 tokens/s" in (copy / "docs" / "performance.md").read_text()
    assert table(copy, "--check").returncode == 0


def test_a_missing_result_is_one_line(copy: Path) -> None:
    (copy / "bench" / "results" / "served.json").unlink()
    done = table(copy, "--check")
    assert done.returncode == 1
    assert "served.json: there is no such file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_page_without_its_markers_is_left_alone(copy: Path) -> None:
    page = copy / "docs" / "performance.md"
    page.write_text("# Performance\n")
    assert table(copy).returncode != 0
    assert page.read_text() == "# Performance\n"
