"""From the settings of `penstock serve` to the command lines of the roles."""

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import msgspec
from msgspec import Meta

from penstock.config import load
from penstock.local import embedded, role_settings
from penstock.local.roles import MODULES, SCHEDULER, SERVICE
from penstock.local.supervisor import Layout

_DESCRIPTION = (
    "Start every role on this machine, each a process of its own: the service, the scheduler with its engine, "
    "and a receiver that keeps the latest traces in memory. A setting of a role is given by --set KEY=VALUE."
)


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator can set for `penstock serve` itself."""

    model_dir: Annotated[
        Path | None,
        Meta(
            description="A Llama, Mistral, Qwen2 or Qwen3 checkpoint with its tokenizer.json. "
            "None: the model that is shipped."
        ),
    ] = None
    grpc_address: Annotated[str, Meta(description="Where the service listens; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    )
    service_processes: Annotated[
        int, Meta(ge=1, le=64, description="Service processes that share the port; connections are spread over them.")
    ] = 1
    executor: Annotated[
        Literal["auto", "multiprocess", "uniproc", "simulated"],
        Meta(
            description="What computes: the model in a process of its own, in the engine's, or a simulation. "
            "auto: multiprocess if there is a GPU, else uniproc."
        ),
    ] = "auto"
    start_timeout: Annotated[float, Meta(gt=0, description="Seconds until the model must be ready.")] = 300.0
    drain_grace: Annotated[float, Meta(ge=0, description="Seconds that running requests get at the end.")] = 10.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level that the roles log.")
    ] = "warning"


SETTINGS = frozenset(ServeConfig.__struct_fields__)


def resolve(argv: Sequence[str], prog: str) -> Layout:
    """The layout that a command line asks for. `--help` and `--print-config` print and raise SystemExit.

    Raises ConfigError.
    """
    left, pairs = role_settings.split(argv, SETTINGS)
    own = [word for word in left if word != "--print-config"]
    layout = layout_of(_load(own, prog))
    if pairs:
        layout = _with_settings(layout, pairs)
    if own != left:
        _print_and_exit(_printed([*own, "--print-config"], prog), layout)
    return layout


def _load(argv: Sequence[str], prog: str) -> ServeConfig:
    return load(ServeConfig, argv, os.environ, prog=prog, description=_DESCRIPTION, positional="model_dir")


def _printed(argv: Sequence[str], prog: str) -> role_settings.Printed:
    """What `load` prints instead of returning."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _load(argv, prog)
    shown: role_settings.Printed = json.loads(text.getvalue())
    return shown


def layout_of(config: ServeConfig) -> Layout:
    """The layout of the settings of `serve` alone."""
    model_dir = config.model_dir or embedded.path()
    shared = ("--log-level", config.log_level, "--drain-grace", str(config.drain_grace))
    return Layout(
        grpc_address=config.grpc_address,
        scheduler_argv=("--model", str(model_dir), "--executor", config.executor, *shared),
        service_argv=("--service-processes", str(config.service_processes), *shared),
        start_timeout_s=config.start_timeout,
        drain_grace_s=config.drain_grace,
        api_key=own_key(os.environ),
    )


def own_key(environ: Mapping[str, str]) -> str | None:
    """The first of the keys that the service will accept, for our own calls; None if it asks for none."""
    keys = [key.strip() for key in environ.get("PENSTOCK_API_KEYS", "").split(",")]
    return next((key.rpartition(":")[2] for key in keys if key), None)


def _commands(layout: Layout) -> dict[str, list[str]]:
    return {
        SCHEDULER: [MODULES[SCHEDULER], *layout.scheduler_argv],
        SERVICE: [MODULES[SERVICE], *layout.service_argv, "--grpc-address", layout.grpc_address],
    }


def _with_settings(layout: Layout, pairs: Sequence[tuple[str, str]]) -> Layout:
    """The layout with the roles' own settings; the roles check the values before anything is started."""
    added = role_settings.assign(pairs, role_settings.printed(_commands(layout)))
    changed = msgspec.structs.replace(
        layout,
        scheduler_argv=(*layout.scheduler_argv, *added[SCHEDULER]),
        service_argv=(*layout.service_argv, *added[SERVICE]),
    )
    role_settings.printed(_commands(changed))
    return changed


def _print_and_exit(own: role_settings.Printed, layout: Layout) -> NoReturn:
    print(json.dumps({"serve": own, **role_settings.printed(_commands(layout))}, indent=2, ensure_ascii=False))
    raise SystemExit(0)
