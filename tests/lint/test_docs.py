"""What the documentation lists is what the code has."""

import re
import subprocess
import sys
from pathlib import Path

import grpc

from penstock.executor.models.config import FAMILY_DEFAULTS
from penstock.v1 import ErrorReason

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \|", re.MULTILINE)
COMMENT = re.compile(r"^  // ([A-Z_]+): .*\n(?:  // .*\n)*  ERROR_REASON_([A-Z_]+) = \d+;", re.MULTILINE)


def test_every_reason_is_in_the_table_with_the_code_of_the_contract() -> None:
    listed = ROW.findall((ROOT / "docs" / "errors.md").read_text())
    contract = (ROOT / "proto" / "penstock" / "v1" / "error.proto").read_text()
    assert listed == [(reason, code) for code, reason in COMMENT.findall(contract)]
    assert [reason for reason, _ in listed] == [reason.name for reason in ErrorReason if reason]
    assert {code for _, code in listed} <= set(grpc.StatusCode.__members__)


def test_the_settings_are_those_that_the_commands_have() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "document_settings.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_models_are_those_that_can_be_served() -> None:
    listed = re.findall(r"^\| `(\w+ForCausalLM)` \|", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    assert listed == list(FAMILY_DEFAULTS)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) >= 8
    for page in pages:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_folder_of_the_readme_is_there() -> None:
    table = re.findall(r"^\| (`[^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    folders = re.findall(r"`([a-z]+)/`", " ".join(table))
    assert {"proto", "scheduler", "service", "clients", "local", "tests"} <= set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)
