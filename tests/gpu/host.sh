# To be sourced from the root of a checkout, on a host that has torch and Triton but no package registry: a Python with
# SGLang and this project, and what an earlier run has compiled.
#   SITE=archive of SGLang   WHEELS=folder with this project's and pytest's wheels   OUT=folder for logs and caches
#   CACHES=archive that `pack_caches` made (optional)
work=$(mktemp -d)
mkdir -p "$work/site" "$work/pkg"
tar -xJf "$SITE" -C "$work/site"
python3 -m pip install -q --no-index --no-deps --target "$work/pkg" "$WHEELS"/*.whl
[ -z "${CACHES:-}" ] || tar -xJf "$CACHES" -C "$HOME"
export PYTHONPATH="$PWD:$work/pkg:$work/site" SGLANG_JIT_DEEPGEMM_PRECOMPILE=0 PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0

pack_caches() {
    tar -C "$HOME" -cJf "$OUT/caches.tar.xz" $(cd "$HOME" && ls -d .cache/flashinfer .cache/tvm-ffi .cache/deep_gemm .deep_gemm .triton 2>/dev/null) || true
}
