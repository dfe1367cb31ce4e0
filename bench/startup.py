"""From nothing to the first token: a fresh process that loads a model and generates one token, again and again.

    python bench/startup.py MODEL --cold --repeats 2

``--cold``: the first start finds no compiled kernels (they go into a fresh folder, or into ``--caches``, which should
be empty); the others find what it left. The checkpoint should be in the page cache: it is read once before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import save

CHILD = """
import json, sys, time
from penstock.local import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
ready = time.time()
llm.generate([[5, 6, 7] * 40], SamplingParams(max_tokens=1), progress=False)
first = time.time()
info = llm.engine.info
print(json.dumps({"imported": imported, "ready": ready, "first": first, "stages_ms": info.startup_ms,
                  "memory_bytes": info.memory_bytes, "attention_backends": info.attention_backends}), flush=True)
llm.close()
"""
LIMIT_S = 300


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--caches", type=Path, help="for --cold: a folder to keep")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of LLM")
    parser.add_argument("--name", default="startup", help="of the file in bench/results")
    options = parser.parse_args()
    for path in options.model.glob("*.safetensors"):
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    settings: dict[str, Any] = {"max_model_tokens": 4096, "progress": False}
    settings |= {key: int(value) if value.isdigit() else value for key, value in (p.split("=", 1) for p in options.set)}
    with tempfile.TemporaryDirectory() as fresh:
        caches = options.caches or Path(fresh)
        environment = dict(os.environ)
        if options.cold:
            environment |= {
                "TRITON_CACHE_DIR": f"{caches}/triton",
                "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": f"{caches}/cute",
            }
        starts = [start(options.model, settings, environment) for _ in range(options.repeats)]
    save(options.name, {"model": str(options.model), "cold": options.cold, "settings": settings, "starts": starts})


def start(model: Path, settings: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """One start: seconds until imported, ready and the first token; stages of the worker."""
    begun = time.time()
    command = [sys.executable, "-c", CHILD, str(model), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    for name in ("imported", "ready", "first"):
        said[f"{name}_s"] = round(said.pop(name) - begun, 2)
    print(json.dumps(said), flush=True)
    return dict(said)


if __name__ == "__main__":
    main()
