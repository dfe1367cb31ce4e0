"""Configuration of a role: one frozen struct, filled from flags over `PENSTOCK_*` variables over defaults."""

from penstock.config.errors import ConfigError, run_or_exit
from penstock.config.load import load
from penstock.config.render import secret_environ, to_argv

__all__ = ["ConfigError", "load", "run_or_exit", "secret_environ", "to_argv"]
