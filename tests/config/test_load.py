from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from penstock.config import ConfigError, load, run_or_exit


class Role(msgspec.Struct, frozen=True, kw_only=True):
    model_dir: Annotated[Path | None, Meta(description="Folder of the checkpoint.")] = None
    max_sequences: Annotated[int, Meta(ge=1, le=1024, description="Sequences at once.")] = 64
    grace_s: Annotated[float, Meta(gt=0, description="How long to wait.")] = 10.0
    executor: Annotated[Literal["uniproc", "simulated"], Meta(description="What computes.")] = "uniproc"
    plans: Annotated[Literal[1, 2, 4], Meta(description="Plans in flight.")] = 2
    tracing: Annotated[bool, Meta(description="Whether to trace.")] = True
    schedulers: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[^:]+:\d+$")], ...],
        Meta(description="Addresses.", min_length=1),
    ] = ("localhost:1",)
    sizes: Annotated[tuple[int, ...], Meta(description="Sizes.")] = ()
    api_keys: Annotated[tuple[Annotated[str, Meta(min_length=8)], ...], Meta(description="Keys.")] = ()
    endpoint: Annotated[str | None, Meta(description="Where traces go.")] = None
    depth: Annotated[int, Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.plans == 4 and self.executor != "simulated":
            raise ValueError("--plans 4 needs --executor simulated")


class Needy(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(description="Who.")]


def read(*argv: str, **environ: str) -> Role:
    return load(Role, argv, environ, prog="penstock x", description="A role.", positional="model_dir")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--max-sequences 3", "max_sequences", 3),
        ("--max-sequences=3", "max_sequences", 3),
        ("--set max_sequences=3", "max_sequences", 3),
        ("--set=max-sequences=3", "max_sequences", 3),
        ("--max-sequences 3 --set max_sequences=3", "max_sequences", 3),
        ("--max-sequences 3 --max-sequences=03", "max_sequences", 3),
        ("--grace-s 1e-3", "grace_s", 0.001),
        ("--executor simulated", "executor", "simulated"),
        ("--plans 1", "plans", 1),
        ("--tracing", "tracing", True),
        ("--no-tracing", "tracing", False),
        ("--tracing=off", "tracing", False),
        ("--set tracing=no", "tracing", False),
        ("--schedulers a:1,b:2 --schedulers c:3", "schedulers", ("a:1", "b:2", "c:3")),
        ("--set schedulers=a:1,b:2", "schedulers", ("a:1", "b:2")),
        ("--sizes -1,2", "sizes", (-1, 2)),
        ("--sizes=", "sizes", ()),
        ("--endpoint=", "endpoint", None),
        ("--endpoint a=b", "endpoint", "a=b"),
        ("--depth 2", "depth", 2),
        ("--depth=", "depth", None),
        ("folder", "model_dir", Path("folder")),
        ("-- --folder", "model_dir", Path("--folder")),
        ("--model-dir folder folder", "model_dir", Path("folder")),
        ("--model-dir ~/x", "model_dir", Path.home() / "x"),
        ("--model-dir ~nobody-of-that-name/x", "model_dir", Path("~nobody-of-that-name/x")),
    ],
)
def test_flags(argv: str, field: str, value: object) -> None:
    found = getattr(read(*argv.split(" ")), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max-sequences 0", "--max-sequences: expected int >= 1, got '0'"),
        ("--max-sequences 1025", "--max-sequences: expected int <= 1024, got '1025'"),
        ("--max-sequences many", "--max-sequences: expected a whole number, got 'many'"),
        ("--max-sequences 1.5", "--max-sequences: expected a whole number, got '1.5'"),
        ("--set max_sequences=many", "--set max_sequences: expected a whole number, got 'many'"),
        ("--max-sequences", "--max-sequences: needs a value"),
        ("--max-sequences --tracing", "--max-sequences: needs a value"),
        ("--max-seq 3", "unknown flag --max-seq (did you mean --max-sequences?)"),
        ("--zzz=SECRET", "unknown flag --zzz"),
        ("-x", "unknown flag -x"),
        ("--no-max-sequences", "unknown flag --no-max-sequences"),
        ("--no-tracing=true", "unknown flag --no-tracing"),
        ("--set max_sequence=3", "--set max_sequence: unknown key (did you mean max_sequences?)"),
        ("--set max_sequences", "--set max_sequences: expected key=value"),
        ("--max-sequences 3 --max-sequences 4", "--max-sequences is given twice: the values contradict"),
        (
            "--set max_sequences=3 --max-sequences 4",
            "--set max_sequences and --max-sequences: the values contradict each other",
        ),
        ("--tracing --no-tracing", "--tracing and --no-tracing: the values contradict each other"),
        ("--schedulers a:1 --set schedulers=b:2", "the values contradict each other"),
        ("--grace-s nan", "--grace-s: expected a finite number, got 'nan'"),
        ("--grace-s inf", "--grace-s: expected a finite number, got 'inf'"),
        ("--grace-s 0", "--grace-s: expected float > 0.0, got '0'"),
        ("--grace-s x", "--grace-s: expected a number, got 'x'"),
        ("--executor gpu", "--executor: expected one of uniproc, simulated, got 'gpu'"),
        ("--tracing=maybe", "--tracing: expected true or false, got 'maybe'"),
        ("--schedulers nowhere", r"--schedulers: expected str matching regex"),
        ("--schedulers=", "--schedulers: expected array of length >= 1"),
        ("--sizes 1,x", "--sizes: expected a whole number, got 'x'"),
        ("--depth 0", "--depth: expected int >= 1, got '0'"),
        ("a b", "MODEL_DIR is given twice: the values contradict each other"),
        ("a --model-dir b", "MODEL_DIR and --model-dir: the values contradict each other"),
        ("--model-dir=a\0b", "--model-dir: expected a path"),
        ("--plans 4", "--plans 4 needs --executor simulated"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv.split(" "))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_flags_win_over_variables_over_defaults() -> None:
    assert read().max_sequences == 64
    assert read(PENSTOCK_MAX_SEQUENCES="5").max_sequences == 5
    assert read("--max-sequences", "6", PENSTOCK_MAX_SEQUENCES="5").max_sequences == 6
    assert read("--set", "max_sequences=7", PENSTOCK_MAX_SEQUENCES="5").max_sequences == 7


def test_variables_of_every_type() -> None:
    config = read(
        PENSTOCK_MODEL_DIR="/m",
        PENSTOCK_TRACING="false",
        PENSTOCK_SCHEDULERS="a:1, b:2",
        PENSTOCK_ENDPOINT="e:1",
        PENSTOCK_GRACE_S="2",
    )
    assert config.model_dir == Path("/m")
    assert config.tracing is False
    assert config.schedulers == ("a:1", "b:2")
    assert config.endpoint == "e:1"
    assert config.grace_s == 2.0


def test_an_empty_variable_is_unset_and_a_strange_one_is_another_roles() -> None:
    assert read(PENSTOCK_MAX_SEQUENCES="", PENSTOCK_WHATEVER="1") == Role()


def test_a_bad_variable_is_named_and_a_flag_spares_it() -> None:
    with pytest.raises(ConfigError, match=r"^PENSTOCK_MAX_SEQUENCES: expected a whole number, got 'x'$"):
        read(PENSTOCK_MAX_SEQUENCES="x")
    assert read("--max-sequences", "2", PENSTOCK_MAX_SEQUENCES="x").max_sequences == 2


def test_what_is_required_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"^--name is required \(or PENSTOCK_NAME\)$"):
        load(Needy, [], {}, prog="x", description="")
    assert load(Needy, [], {"PENSTOCK_NAME": "n"}, prog="x", description="").name == "n"


def test_without_a_positional_free_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="unexpected argument 'free'"):
        load(Needy, ["--name", "n", "free"], {}, prog="x", description="")


def test_a_refused_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        read("--api-keys", "hunter2")
    assert "hunter2" not in str(caught.value)
    assert "--api-keys" in str(caught.value)


def test_structs_that_cannot_be_configurations_are_refused() -> None:
    class Mutable(msgspec.Struct):
        x: int = 1

    class Odd(msgspec.Struct, frozen=True):
        x: dict[str, int] = {}

    class Reserved(msgspec.Struct, frozen=True):
        help: bool = False

    class Union(msgspec.Struct, frozen=True):
        x: int | str = 1

    class Pair(msgspec.Struct, frozen=True):
        x: tuple[int, int] = (1, 2)

    for kind in (Mutable, Odd, Reserved, Union, Pair):
        with pytest.raises(TypeError):
            load(kind, [], {}, prog="x", description="")


def test_run_or_exit(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> int:
        raise ConfigError("--x: no\nsuch thing")

    for main, code in ((refused, 2), (lambda: None, 0), (lambda: 3, 3)):
        with pytest.raises(SystemExit) as caught:
            run_or_exit(main)
        assert caught.value.code == code
    assert capsys.readouterr().err == "error: --x: no such thing\n"
