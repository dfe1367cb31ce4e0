"""`--set key=value` finds the role that knows the key."""

import pytest

from penstock.config import ConfigError
from penstock.local.role_settings import assign, split

OWN = frozenset({"executor", "model_dir"})
KNOWN: dict[str, dict[str, dict[str, object]]] = {
    "scheduler": {"max_sequences": {"value": 64}, "log_level": {"value": "info"}, "grpc_address": {"value": ""}},
    "service": {"encode_threads": {"value": 2}, "log_level": {"value": "info"}, "schedulers": {"value": []}},
}


def test_keys_of_roles_are_taken_out() -> None:
    argv = ["dir", "--set", "max_sequences=8", "--executor", "uniproc", "--set=encode-threads=1"]
    assert split(argv, OWN) == (
        ["dir", "--executor", "uniproc"],
        [("max_sequences", "8"), ("encode_threads", "1")],
    )


def test_own_keys_stay() -> None:
    argv = ["--set", "executor=simulated", "--set=model_dir=x"]
    assert split(argv, OWN) == (argv, [])


@pytest.mark.parametrize(
    "argv", [["--set"], ["--set", "nothing"], ["--set=nothing"], ["--set", "=3"], ["--", "--set", "a=b"]]
)
def test_what_is_malformed_stays_for_the_parser(argv: list[str]) -> None:
    assert split(argv, OWN) == (argv, [])


def test_a_value_may_hold_equals_signs() -> None:
    assert split(["--set", "key=a=b"], OWN) == ([], [("key", "a=b")])


def test_each_role_gets_its_keys_and_common_ones_go_to_all() -> None:
    pairs = [("max_sequences", "8"), ("encode_threads", "1"), ("log_level", "debug")]
    assert assign(pairs, KNOWN) == {
        "scheduler": ["--set", "max_sequences=8", "--set", "log_level=debug"],
        "service": ["--set", "encode_threads=1", "--set", "log_level=debug"],
    }


def test_an_unknown_key_is_one_line_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"--set max_sequence: no role knows .*did you mean max_sequences\?"):
        assign([("max_sequence", "8")], KNOWN)


def test_keys_of_callers_do_not_go_on_a_command_line() -> None:
    with pytest.raises(ConfigError, match="give it as PENSTOCK_API_KEYS"):
        assign([("api_keys", "x")], KNOWN)


@pytest.mark.parametrize("key", ["grpc_address", "schedulers"])
def test_what_serve_decides_cannot_be_set(key: str) -> None:
    with pytest.raises(ConfigError, match="decided by serve"):
        assign([(key, "x")], KNOWN)
