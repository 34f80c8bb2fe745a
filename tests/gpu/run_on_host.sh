#!/usr/bin/env bash
# All GPU tests on a host that has torch and Triton but no package registry. Fails if every GPU test was skipped.
#   SITE=archive of SGLang   WHEELS=folder with this project's and pytest's wheels   OUT=folder for logs and caches
set -euo pipefail
work=$(mktemp -d)
mkdir -p "$work/site" "$work/pkg"
tar -xJf "$SITE" -C "$work/site"
python3 -m pip install -q --no-index --no-deps --target "$work/pkg" "$WHEELS"/*.whl
[ -z "${CACHES:-}" ] || tar -xJf "$CACHES" -C "$HOME"
export PYTHONPATH="$PWD:$work/pkg:$work/site" SGLANG_JIT_DEEPGEMM_PRECOMPILE=0 PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
status=0
timeout "${TIMEOUT_S:-480}" python3 -m pytest -p no:cacheprovider --require-gpu -q -rs -s "$@" || status=$?
cp -r "${TMPDIR:-/tmp}"/pytest-of-*/pytest-current/*/*.log "$OUT"/ 2>/dev/null || true
tar -C "$HOME" -cJf "$OUT/caches.tar.xz" $(cd "$HOME" && ls -d .cache/flashinfer .cache/tvm-ffi .cache/deep_gemm .deep_gemm .triton 2>/dev/null) || true
exit "$status"
