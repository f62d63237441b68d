#!/usr/bin/env bash
# Everything that waits for a GPU, from a bare machine with torch, triton and nvcc: build, GPU tests,
# memory checker, benches. Logs and result rows are copied to $OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-check}
mkdir -p "$OUT"
ls fastgfn/_C*.so >/dev/null 2>&1 || python3 setup.py build_ext --inplace >"$OUT/build.log" 2>&1
cp fastgfn/_C*.so "$OUT/"
python3 -m pip install --quiet --no-build-isolation --no-deps --no-index -e . >>"$OUT/build.log" 2>&1
pytest -m gpu tests 2>&1 | tee "$OUT/tests.log"
compute-sanitizer --tool memcheck --error-exitcode 1 pytest -m gpu tests/test_csrc_cuda.py 2>&1 | tee "$OUT/sanitizer.log"
python3 bench/bench_subtb.py 2>&1 | tee "$OUT/bench.log"
cp bench/results/*/*.csv "$OUT/"
