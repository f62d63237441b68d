#!/usr/bin/env bash
# Everything that waits for a GPU, from a bare machine with torch, triton and nvcc:
#     [OUT=folder] [WHEELS=folder] [FASTGFN_COMMIT=hash] [PEAK=text] bash bench/gpu_check.sh [STEP ...]
# Steps: build tests sanitizer head subtb attention draw, all of them by default. One that fails does not stop the
# later ones; the exit status tells. $OUT gets 6 files: the extension, check.log and a CSV per op bench.
# WHEELS holds what the machine lacks (pytest-benchmark, cut-cross-entropy, liger-kernel, quack-kernels, ...).
# FASTGFN_COMMIT names the clean commit that a copy without git was made from. PEAK: cases whose peak memory is
# measured, by a part of their id; a process per provider takes about 10 s.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-check}
WHEELS=${WHEELS:-.whl}
PEAK=${PEAK:-fwd+dH-bfloat16-N4096-D2048-V128256}
failed=()
mkdir -p "$OUT"

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  # One by one: a wheel that does not fit this machine must not keep the others out.
  for wheel in "$WHEELS"/*.whl; do
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel" || echo "no $wheel"
  done
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

build() {
  ls fastgfn/_C*.so >/dev/null 2>&1 || python3 setup.py build_ext --inplace || return 1
  python3 -m pip install --quiet --no-build-isolation --no-deps --no-index -e . && cp fastgfn/_C*.so "$OUT/"
}

tests() { pytest -m gpu tests; }

sanitizer() { compute-sanitizer --tool memcheck --error-exitcode 1 pytest -m gpu tests/test_csrc_cuda.py; }

# A case that fails is named in the log; the rows of the others are kept.
op() {
  local report status=0
  report=$(mktemp)
  pytest "bench/test_bench_$1.py" --benchmark-only --shapes full "--peak=$PEAK" "--benchmark-json=$report" || status=1
  [[ ! -s $report ]] || python3 bench/rows.py "$report" --out "$OUT" || status=1
  rm "$report"
  return $status
}

run() {
  case $1 in
  build | tests | sanitizer) "$1" ;;
  *) op "$1" ;;
  esac
}

for step in ${*:-build tests sanitizer head subtb attention draw}; do
  echo "== $step"
  run "$step" 2>&1 || failed+=("$step")
done > >(tee -a "$OUT/check.log")
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" | tee -a "$OUT/check.log"
  exit 1
fi
