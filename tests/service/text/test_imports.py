import json
import subprocess
import sys

PROBE = """
import json, sys
import penstock.service.text.pool, penstock.service.text.stream
heavy = {"grpc", "google", "betterproto2", "transformers", "torch", "numpy", "opentelemetry"}
print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] in heavy or name.startswith("penstock."))))
"""


def test_the_package_stands_alone() -> None:
    """It loads neither the wire nor telemetry, nor what they bring; of Penstock nothing but itself."""
    shown = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60)
    others = [name for name in json.loads(shown.stdout) if not name.startswith("penstock.service.text")]
    assert others == ["penstock.service"]
