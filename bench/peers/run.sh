#!/usr/bin/env bash
# Measure vLLM on the machine with the GPU, from the root of the repository.
#   OUT=DIR bench/peers/run.sh PART…      PART: ceilings, t1, t2, t3, t4, served; without any: ceilings t1 t2
# BUNDLE names what build_bundle.sh made (.whl/site.tar.xz). Figures are added to $OUT/peers.jsonl, one JSON object a
# line; the log of a part is $OUT/PART.log. Each part has a limit of time; one that fails does not stop the next.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${OUT:?where results go}"
site=${SITE:-/tmp/vllm-site}
bundle=${BUNDLE:-.whl/site.tar.xz}

if [ ! -e "$site/.whole" ]; then
  mkdir -p "$site"
  python3 - "$bundle" "$site" <<'UNPACK' || exit 1
import sys, tarfile
with tarfile.open(sys.argv[1], "r:xz") as bundle:
    bundle.extractall(sys.argv[2], filter="tar")
UNPACK
  touch "$site/.whole"
fi

export PYTHONPATH=$here/normal_weights:$site PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# A machine without a network knows no address of itself. FlashInfer's sampler is not in the bundle.
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_CACHE_ROOT=/tmp/cache/vllm TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor TRITON_CACHE_DIR=/tmp/cache/triton

failed=0
for part in "${@:-ceilings t1 t2}"; do
  for name in $part; do
    case $name in
      ceilings) limit=60 ;;
      t1 | t3) limit=140; export VLLM_ENABLE_V1_MULTIPROCESSING=0 ;; # one process: a small model is held up by the other
      t2 | t4) limit=170; export VLLM_ENABLE_V1_MULTIPROCESSING=1 ;;
      served) limit=420; export VLLM_ENABLE_V1_MULTIPROCESSING=1 ;;
      *) echo "error: there is no part $name" >&2; exit 2 ;;
    esac
    begun=$SECONDS
    timeout -k 5 "$limit" python3 "$here/vllm_bench.py" "$name" "$OUT" >"$OUT/$name.log" 2>&1
    code=$?
    echo "== $name: exit code $code after $((SECONDS - begun)) s"
    grep -E "WEIGHTS|^FIGURE" "$OUT/$name.log" | cut -c1-420
    if [ "$code" != 0 ]; then
      failed=1
      tail -n 25 "$OUT/$name.log" | cut -c1-300
    fi
  done
done
exit $failed
