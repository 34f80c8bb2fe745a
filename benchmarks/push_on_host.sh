#!/usr/bin/env bash
# `python -m benchmarks.push` on a host with two GPUs but no package registry. Its variables: tests/gpu/host.sh; and
# TIMEOUT_S (570), within which all is done. Each argument is one run, in words:
#   benchmarks/push_on_host.sh '--model qwen3-8b --load 8' '--model qwen3-30b-a3b --peer-pushes 2'
#   benchmarks/push_on_host.sh '--model qwen3-8b --only ours --fsdp --load 1 8 64 --in-flight keep retract'
#   benchmarks/push_on_host.sh '--model qwen3-8b --only ours --layers 12' '--model qwen3-8b --only ours --layers 24'
#   benchmarks/push_on_host.sh '--model qwen3-8b --only ours --fp8-gemm-backend deep_gemm --label deep-gemm'
# In OUT: figures of each run (JSON), logs.tar.xz, caches.tar.xz.
set -euo pipefail
. tests/gpu/host.sh
limit=${TIMEOUT_S:-570} reserve=25 status=0 # reserve: to stop servers and pack
for run in "$@"; do
    left=$((limit - reserve - SECONDS))
    if [ "$left" -lt 60 ]; then
        echo "$left s are left: not run: $run"
        status=1
        continue
    fi
    echo "== $run"
    # shellcheck disable=SC2086  # words are what it is
    timeout -k 5 "$((left + 15))" python3 -m benchmarks.push --out "$OUT" --deadline-s "$left" $run || status=$?
done
python3 -m benchmarks.scaling "$OUT"/*.json || status=$?
[ ! -d "$OUT/logs" ] || { tar -C "$OUT" -cJf "$OUT/logs.tar.xz" logs && rm -rf "$OUT/logs"; }
pack_caches
exit "$status"
