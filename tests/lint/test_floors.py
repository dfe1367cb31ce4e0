"""The locks hold: a wrong file fails the type checker, a wrong import fails the floors."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTIONS: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["dev-mode-dirs"]

LINT_IMPORTS = """
import sys
sys.path[:0] = sys.argv[1:]
sys.dont_write_bytecode = True
from importlinter.cli import lint_imports_command
lint_imports_command(["--no-logo", "--no-cache"])
"""

FORBIDDEN = [
    ("proto/penstock/rpc/codec.py", "import penstock.generated.penstock.v1"),
    ("config/penstock/config/load.py", "import structlog"),
    ("telemetry/penstock/telemetry/logging.py", "import opentelemetry.trace"),
    ("kernels/penstock/kernels/__init__.py", "import penstock.telemetry.logging"),
    ("executor/penstock/executor/step.py", "def late() -> None:\n    import torch"),
    ("executor/penstock/executor/models/llama.py", "import penstock.scheduler.core.sequence"),
    ("scheduler/penstock/scheduler/core/sequence.py", "import torch"),
    ("scheduler/penstock/scheduler/engine/loop.py", "import grpc"),
    ("scheduler/penstock/scheduler/gate/__init__.py", "import penstock.scheduler.engine.loop"),
    ("service/penstock/service/__init__.py", "import penstock.scheduler.records.events"),
    ("service/penstock/service/text/__init__.py", "import penstock.v1"),
    ("service/penstock/service/text/__init__.py", "import transformers"),
    ("clients/python/penstock/client/types.py", "import penstock.service"),
    ("local/penstock/local/serve.py", "import penstock.service.main"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and of the settings of the tools."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "floors.py", copy / "tools")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "tokenizer.json")
    for portion in PORTIONS:
        shutil.copytree(ROOT / portion / "penstock", copy / portion / "penstock", ignore=ignored)
    return copy


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the copy alone: -S keeps the editable install of the original off the path."""
    site_packages = next(path for path in sys.path if path.endswith("site-packages"))
    path = [str(tree), *(str(tree / portion) for portion in PORTIONS), site_packages]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-c", LINT_IMPORTS, *path],
        cwd=tree,
        env={**environment, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_copy_is_clean(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_forbidden_import_is_found(tree: Path) -> None:
    originals = {file: (tree / file).read_text() for file, _ in FORBIDDEN}
    try:
        for file, line in FORBIDDEN:
            (tree / file).write_text(f"{(tree / file).read_text()}\n{line}\n")
        done = lint_imports(tree)
    finally:
        for file, text in originals.items():
            (tree / file).write_text(text)
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    missing = [(file, line) for file, line in FORBIDDEN if expected(file, line) not in said]
    assert not missing, done.stdout


def expected(file: str, line: str) -> str:
    """How the contract names an import; generated code is guarded by a contract of its own."""
    module = file.partition("penstock/")[2].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    imported = line.split()[-1]
    if imported.startswith("penstock.generated"):
        return f"penstock.{module} -> {imported}"
    return f"penstock.{module} imports {imported if imported.startswith('penstock') else imported.partition('.')[0]},"


def test_a_module_of_a_new_part_fails(tree: Path) -> None:
    part = tree / "local" / "penstock" / "novelty"
    part.mkdir()
    try:
        (part / "__init__.py").write_text("")
        done = lint_imports(tree)
    finally:
        shutil.rmtree(part)
    assert done.returncode != 0
    assert "novelty" in done.stdout


def mypy(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tree / ".mypy_cache"), *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_wrong_file_fails_the_type_checker(tree: Path) -> None:
    """With the settings of the project, narrowed to one folder: what lies in a portion is found and checked."""
    settings = tree / "pyproject.toml"
    text = settings.read_text()
    wrong = tree / "config" / "penstock" / "config" / "wrong.py"
    narrowed = "\n".join('files = ["config"]' if line.startswith("files = [") else line for line in text.splitlines())
    try:
        settings.write_text(narrowed)
        right = mypy(tree)
        wrong.write_text(
            "from penstock.config import ConfigError\n\ncount: int = ConfigError('x')\n\ndef bare(x): ...\n"
        )
        done = mypy(tree)
    finally:
        settings.write_text(text)
        wrong.unlink(missing_ok=True)
    assert right.returncode == 0, right.stdout
    assert done.returncode == 1
    assert "config/penstock/config/wrong.py:3: error: Incompatible types in assignment" in done.stdout
    assert "config/penstock/config/wrong.py:5: error: Function is missing a type annotation" in done.stdout


def test_the_tools_look_at_every_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    checked = {Path(folder) for folder in settings["mypy"]["files"]}
    path = settings["mypy"]["mypy_path"]
    build = settings["hatch"]["build"]
    for portion in PORTIONS:
        assert checked & {Path(portion), *Path(portion).parents}, f"mypy does not look at {portion}"
        assert f"$MYPY_CONFIG_FILE_DIR/{portion}" in path.split(":")
        assert portion in build["targets"]["wheel"]["sources"]
        assert f"{portion}/penstock" in build["targets"]["wheel"]["only-include"]
    found = {str(folder.parent.relative_to(ROOT)) for folder in ROOT.glob("*/penstock")}
    found |= {str(folder.parent.relative_to(ROOT)) for folder in ROOT.glob("clients/*/penstock")}
    assert found == set(PORTIONS)


def test_no_portion_hides_the_others() -> None:
    for portion in PORTIONS:
        assert not (ROOT / portion / "__init__.py").exists()
        assert not (ROOT / portion / "penstock" / "__init__.py").exists()
