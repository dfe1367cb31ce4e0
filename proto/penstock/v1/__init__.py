"""The messages of ``penstock.v1``: the one public face of the generated code."""

from penstock.generated.penstock.v1 import *  # noqa: F403
from penstock.generated.penstock.v1 import __all__ as __all__
