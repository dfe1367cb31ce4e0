"""Generate `proto/penstock/generated/` from the `.proto` files; with `--check`, only say whether it is up to date."""

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROTO = Path(__file__).resolve().parents[1] / "proto"
GENERATED = PROTO / "penstock" / "generated"
OPTIONS = "client_generation=none,server_generation=none,google_protobuf_descriptors"


def main(arguments: list[str]) -> int:
    """Generate or check; 1 if a check finds a difference."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "generated"
        fresh.mkdir()
        generate(fresh)
        if arguments == ["--check"]:
            return check(fresh)
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED)
    return 0


def generate(into: Path) -> None:
    """Run the compiler. Its plugin is looked for beside this interpreter. Raises CalledProcessError.

    The plugin formats with the ruff settings of its working directory, hence one with none.
    """
    (into.parent / "ruff.toml").touch()
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("penstock/v1/*.proto"))
    compiler = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO)]
    output = [f"--python_betterproto2_out={into}", f"--python_betterproto2_opt={OPTIONS}"]
    done = subprocess.run(
        [*compiler, *output, *sources],
        cwd=into.parent,
        env={**os.environ, "PATH": beside},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        done.check_returncode()


def check(fresh: Path) -> int:
    """Compare byte for byte with what is checked in; names each file that differs."""
    differing = sorted(
        path
        for path in {*_files(fresh), *_files(GENERATED)}
        if not (fresh / path).exists()
        or not (GENERATED / path).exists()
        or not filecmp.cmp(fresh / path, GENERATED / path, shallow=False)
    )
    for path in differing:
        print(f"error: {GENERATED / path} is not what the .proto files give: run make proto", file=sys.stderr)
    return 1 if differing else 0


def _files(root: Path) -> Iterator[Path]:
    return (path.relative_to(root) for path in root.rglob("*") if path.suffix in (".py", ".typed"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
