#!/usr/bin/env bash
# All GPU tests on a host that has torch and Triton but no package registry. Fails if every GPU test was skipped.
# Its variables: tests/gpu/host.sh. Arguments go to pytest.
set -euo pipefail
. tests/gpu/host.sh
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
status=0
timeout "${TIMEOUT_S:-480}" python3 -m pytest -p no:cacheprovider --require-gpu -q -rs -s "$@" || status=$?
cp -r "${TMPDIR:-/tmp}"/pytest-of-*/pytest-current/*/*.log "$OUT"/ 2>/dev/null || true
pack_caches
exit "$status"
