#!/usr/bin/env bash
# Pack vLLM into one file of about 46 MiB, for an H200 machine without a network that has Python 3.12 and torch 2.11
# with CUDA 13, triton, transformers, numpy, numba and grpcio. Needs no GPU; xz -9 takes about 4 minutes on 2 cores.
#   build_bundle.sh WORK_DIR  ->  WORK_DIR/site.tar.xz
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?work dir}
python=${PYTHON:-python3}
mkdir -p "$work/wheels"
cd "$work"

# The list holds what vLLM's metadata asks for and that machine lacks, less what a dense bf16 model never imports.
platforms=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64)
for glibc in $(seq 39 -1 5); do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d wheels vllm==0.26.0 -r "$here/bundle-requirements.txt"

rm -rf site
mkdir site
for wheel in wheels/*.whl; do "$python" -m zipfile -e "$wheel" site; done
for data in site/*.data/purelib site/*.data/platlib; do
  if [ -d "$data" ]; then cp -r "$data/." site/; fi
done
cd site
rm -rf ./*.data bin

# Not on the path of a dense bf16 model on Hopper: the Rust front end (off by default), FlashAttention 2 (3 is used
# there), mixtures of experts, latent attention, fp4 and Blackwell code.
rm -rf vllm/vllm-rs vllm/_moe_C_stable_libtorch.abi3.so vllm/_flashmla*.so vllm/_qutlass_C.abi3.so \
  vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/third_party/{deep_gemm,fmha_sm100,tml_fa4} \
  vllm/distributed/kv_transfer/*.jpg vllm/entrypoints/serve/instrumentator/static pycountry/locales mistral_common/data/*
"$python" "$here/fatprune.py" vllm/_C_stable_libtorch.abi3.so
find . -name __pycache__ -prune -exec rm -rf {} +

tar -cf ../site.tar --sort=name .
cd ..
xz -9 -T2 -f site.tar
ls -l site.tar.xz
