"""The messages of ``penstock.v1``: the one public face of the generated code."""

import sys

# betterproto2 imports pydantic where it finds it, a Rust extension that nothing here uses: hide it meanwhile.
if "pydantic" not in sys.modules and "betterproto2" not in sys.modules:
    sys.modules["pydantic"] = None  # type: ignore[assignment]
    try:
        import betterproto2 as betterproto2
    finally:
        del sys.modules["pydantic"]

from penstock.generated.penstock.v1 import *
from penstock.generated.penstock.v1 import __all__ as __all__
