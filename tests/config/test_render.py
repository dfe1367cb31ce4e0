import json
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from penstock.config import load, secret_environ, to_argv

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Role(msgspec.Struct, frozen=True, kw_only=True):
    model_dir: Annotated[Path | None, Meta(description="Folder of the checkpoint.")] = None
    rows: Annotated[int, Meta(description="Rows of a step; " + "many words " * 12)] = 512
    grace_s: float = 10.0
    mode: Annotated[Literal["fast", "exact"], Meta(description="How.")] = "fast"
    tracing: bool = True
    names: tuple[str, ...] = ("a", "b")
    label: str = ""
    api_keys: tuple[str, ...] = ()
    client_secret: str | None = None
    tls_key: Path | None = None


def read(*argv: str, **environ: str) -> Role:
    return load(Role, argv, environ, prog="penstock x", description="A role of it.", positional="model_dir")


def printed(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read(*argv, **environ)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_print_config_tells_values_and_origins(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "/m", "--print-config", "--set", "rows=3", PENSTOCK_NAMES="c", PENSTOCK_ROWS="4")
    assert json.loads(text) == {
        "model_dir": {"value": "/m", "origin": "flag"},
        "rows": {"value": 3, "origin": "flag"},
        "grace_s": {"value": 10.0, "origin": "default"},
        "mode": {"value": "fast", "origin": "default"},
        "tracing": {"value": True, "origin": "default"},
        "names": {"value": ["c"], "origin": "environment"},
        "label": {"value": "", "origin": "default"},
        "api_keys": {"value": [], "origin": "default"},
        "client_secret": {"value": None, "origin": "default"},
        "tls_key": {"value": None, "origin": "default"},
    }


def test_secrets_are_masked_and_key_files_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys,
        "--print-config",
        "--api-keys",
        "hunter2,x",
        "--tls-key=/k.pem",
        PENSTOCK_CLIENT_SECRET="hunter2",
    )
    shown = json.loads(text)
    assert "hunter2" not in text
    assert shown["api_keys"] == {"value": "********", "origin": "flag"}
    assert shown["client_secret"] == {"value": "********", "origin": "environment"}
    assert shown["tls_key"]["value"] == "/k.pem"


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "--help")
    assert text.startswith("usage: penstock x [MODEL_DIR] [flags]\n\nA role of it.\n")
    for expected in (
        "  MODEL_DIR\n        Folder of the checkpoint. [PENSTOCK_MODEL_DIR, default none]\n",
        "  --rows INT\n        Rows of a step; many words",
        "  --mode {fast,exact}\n        How. [PENSTOCK_MODE, default fast]\n",
        "  --tracing, --no-tracing\n",
        "  --names TEXT[,…]\n        [PENSTOCK_NAMES, default a,b]\n",
        "  --set KEY=VALUE\n",
        "  --print-config\n",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


words = st.text(st.characters(codec="utf-8", exclude_characters=",\0"), min_size=1).filter(
    lambda text: text == text.strip()
)
roles = st.builds(
    Role,
    model_dir=st.none() | st.sampled_from([Path("/a b"), Path("--odd"), Path("x=y")]),
    rows=st.integers(-(2**62), 2**62),
    grace_s=st.floats(allow_nan=False, allow_infinity=False),
    mode=st.sampled_from(["fast", "exact"]),
    tracing=st.booleans(),
    names=st.lists(words, max_size=3).map(tuple),
    label=st.text(),
    api_keys=st.lists(words, max_size=2).map(tuple),
    client_secret=st.none() | words,
)


@unhurried
@given(roles)
def test_a_child_process_gets_the_same_configuration(config: Role) -> None:
    argv = to_argv(config)
    hostile = {"PENSTOCK_ROWS": "7", "PENSTOCK_TRACING": "false", "PENSTOCK_API_KEYS": "other"}
    assert read(*argv, **{**hostile, **secret_environ(config)}) == config


def test_secrets_stay_off_the_command_line() -> None:
    config = Role(api_keys=("hunter2",), client_secret="hunter2", tls_key=Path("/k"))
    assert "hunter2" not in " ".join(to_argv(config))
    assert "--tls-key=/k" in to_argv(config)
    assert secret_environ(config) == {"PENSTOCK_API_KEYS": "hunter2", "PENSTOCK_CLIENT_SECRET": "hunter2"}


def test_what_a_flag_cannot_express_is_refused() -> None:
    with pytest.raises(ValueError, match="comma-separated"):
        to_argv(Role(names=("a,b",)))
    with pytest.raises(ValueError, match="empty text"):
        secret_environ(Role(client_secret=""))
