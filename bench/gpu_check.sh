#!/usr/bin/env bash
# Everything that waits for a GPU, from a bare machine with torch, triton, transformers and nvcc:
#     [OUT=folder] [PART="head draw"] [KEEP_BUILD=folder] [WHEELS=folder] [BUDGET=seconds] [DRY=1] make gpu-check
# Parts, in this order: build tests sanitizer head subtb attention path_attention draw rollout goals step. One that
# fails does not stop the later ones; the exit status tells. $OUT gets at most 6 files: the extension, check.log,
# summary.txt, rows.tar.gz (a CSV per op bench), goals.csv (sampling and the training step against the goals of
# goals.py, written row by row; rollout and goals want 400 s each) and step.json (`fastgfn bench`). A call with
# PART adds to an $OUT that is there.
# KEEP_BUILD: where the extension is taken from, or built and left. BUDGET: seconds for all parts of this call,
# 520 by default; what is left is divided among the parts still to come, and a bench skips cases past its share.
# WHEELS: what the machine lacks (pytest-benchmark, peft, cut-cross-entropy, liger-kernel, quack-kernels, ...).
# FASTGFN_COMMIT: the clean commit that a copy without git was made from. PEAK: cases whose peak memory is
# measured, by a part of their id; empty: none. A process per provider takes about 10 s.
# DRY=1: all of it without a GPU: the extension for the CPU, GPU tests collected, kernels compiled ahead of time,
# every bench's inputs and checks at its short shape.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-check}
ops=(head subtb attention path_attention draw)
PART=${PART:-build tests sanitizer$(for op in "${ops[@]}"; do
  [[ ! -f bench/test_bench_$op.py ]] || echo -n " $op"
done) rollout goals step}
KEEP_BUILD=${KEEP_BUILD:-}
WHEELS=${WHEELS:-.whl}
BUDGET=${BUDGET:-520}
DRY=${DRY:-}
PEAK=${PEAK-fwd+dH-bfloat16-N4096-D2048-V128256}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
rows=$(mktemp -d)
[[ ! -f $OUT/rows.tar.gz ]] || tar -xzf "$OUT/rows.tar.gz" -C "$rows"

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  # One by one: a wheel that does not fit this machine must not keep the others out.
  for wheel in "$WHEELS"/*.whl; do
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel" || echo "no $wheel"
  done
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# The package as it would be installed, without installing: `pip install -e` would build the extension again.
package=$(mktemp -d)
mkdir "$package/fastgfn"
ln -s "$PWD"/fastgfn/* "$package/fastgfn/"
ln -sfn "$PWD/kernels" "$package/fastgfn/kernels"
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}"

build() {
  if compgen -G "$KEEP_BUILD/_C*.so" >/dev/null; then
    cp "$KEEP_BUILD"/_C*.so fastgfn/
  elif ! compgen -G "fastgfn/_C*.so" >/dev/null; then
    # torch builds for the cards that it sees
    "$PYTHON" setup.py --quiet build_ext --inplace || return 1
  fi
  [[ -z $KEEP_BUILD ]] || { mkdir -p "$KEEP_BUILD" && cp -n fastgfn/_C*.so "$KEEP_BUILD/"; }
  ln -sf "$PWD"/fastgfn/_C*.so "$package/fastgfn/"
  cp fastgfn/_C*.so "$OUT/"
  "$PYTHON" -P -c 'import fastgfn, json; print(json.dumps(fastgfn.backend_info(), indent=1))'
}

# $1: seconds. Compiling for a few hundred tests takes long, so processes share it; what has come out is shown.
tests() {
  local many=()
  if [[ -n $DRY ]]; then
    "$PYTHON" -P -m pytest -q -m gpu --collect-only tests | tail -n 3
    "$PYTHON" -P -m pytest -q tests/test_kernels_aot.py
  else
    ! "$PYTHON" -c 'import xdist' 2>/dev/null || many=(-n 8)
    timeout -s INT -k 20 "$1" "$PYTHON" -P -m pytest -q -m gpu "${many[@]}" tests
  fi
}

sanitizer() {
  if [[ -n $DRY ]]; then
    "$PYTHON" -P -m pytest -q -m gpu --collect-only tests/test_csrc_cuda.py | tail -n 3
  elif command -v compute-sanitizer >/dev/null; then
    timeout -s INT -k 20 "$1" compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -P -m pytest -q -m gpu \
      tests/test_csrc_cuda.py
  else
    echo "no compute-sanitizer here"
  fi
}

# A case that fails is named in the log; the rows of the others are kept.
op() {
  local report status=0 shapes=(--shapes full "--peak=$PEAK")
  [[ -z $DRY ]] || shapes=(--shapes short --rounds 1)
  report=$(mktemp)
  "$PYTHON" -P -m pytest -q "bench/test_bench_$1.py" --benchmark-only "${shapes[@]}" "--budget=$2" \
    "--benchmark-json=$report" || status=1
  if [[ -s $report ]]; then
    "$PYTHON" bench/rows.py "$report" --out "$rows" || status=1
    (cd "$rows" && tar -czf rows.tar.gz -- *.csv) && mv "$rows/rows.tar.gz" "$OUT/"
  fi
  rm "$report"
  return $status
}

# Each goal has its rows as soon as they are measured; what hangs is ended, and the next goals go on.
goals() {
  nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,power.draw,power.limit --format=csv 2>/dev/null
  "$PYTHON" bench/goals.py "$1" --out "$OUT" "--budget=$2" ${DRY:+--dry}
}

step() {
  local shape=(--shape llama-1b -n 64 --prompt-tokens 200 --output-tokens 30 --rounds 5)
  [[ -z $DRY ]] || shape=(--shape tiny -n 4 --prompt-tokens 9 --output-tokens 5 --rounds 1)
  "$PYTHON" -P -c 'from fastgfn.cli import main; main()' bench "${shape[@]}" --compare hf --json "$OUT/step.json"
}

run() {
  case $1 in
  build | step) "$1" ;;
  tests | sanitizer)
    # at most half of what is left, if more is to come
    local limit=$(((BUDGET - SECONDS) / (left ? 2 : 1)))
    "$1" $((limit > 1 ? limit : 1))
    ;;
  head | subtb | attention | path_attention | draw) op "$@" ;;
  rollout) goals rollout "$2" ;;
  goals) goals step "$2" ;;
  *) echo "no part $1" && return 1 ;;
  esac
}

read -ra parts <<<"$PART"
left=${#parts[@]}
failed=0
for part in "${parts[@]}"; do
  share=$(((BUDGET - SECONDS) / left--))
  started=$SECONDS
  echo "== $part" | tee -a "$OUT/check.log"
  result=ok
  run "$part" "$share" 2>&1 | tee -a "$OUT/check.log" || { result=FAILED && failed=1; }
  echo "$part: $result, $((SECONDS - started)) s${DRY:+, dry}" | tee -a "$OUT/summary.txt"
done
rm -r "$package" "$rows"
exit $failed
