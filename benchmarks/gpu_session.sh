#!/usr/bin/env bash
# What needs a GPU, in one command of under 8 minutes: the tests, the benchmarks, a short training run.
#   OUT=FOLDER      where results, test-gpu.log and rest.tar.gz (the other logs) go (benchmarks/results/session)
#   PYTHON=python3  the interpreter, with its packages as they are: no network is touched
#   MSM_COMMIT=...  what the results name as their commit where there is no clone
#   WHEELS=FOLDER   wheels of packages that the interpreter lacks, used for this command only
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/session}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-session: there is no GPU: skipped"
  exit 0
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

failed=0
# part NAME SECONDS COMMAND...: run it with a limit, log it, go on to the next in any case.
part() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  echo "=== $name: $*"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 40 "$out/$name.log"
  echo "=== $name: exit code $code after $((SECONDS - start)) s (limit $limit s)" | tee -a "$work/summary"
  [ "$code" -eq 0 ] || failed=1
}

{
  date -u
  nvidia-smi
  "$python" -m pip list --disable-pip-version-check
  command -v compute-sanitizer ncu nvcc
} >"$work/environment.txt" 2>&1
"$python" -m tools.setup_env --venv 0 --needs torch numpy triton pydantic pyyaml safetensors || exit 2
export PYTHONPATH="$PWD:$PWD/build/importable${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
workers=
"$python" -c 'import xdist' 2>/dev/null && workers="-n 8"
part test-gpu 120 make PYTHON="$python" VENV=0 test-gpu PYTEST_ARGS="$workers -v --durations=15"
part kernels 110 "$python" -m benchmarks.kernels --minutes 1.5 --out "$out"
part step 160 "$python" -m benchmarks.step --minutes 2.1 --profile --out "$out"
part training 75 "$python" -m benchmarks.training --work "$work/training" --out "$out"

mkdir "$work/rest"
cp "$work/environment.txt" "$work/summary" "$work/rest"
mv "$out/kernels.log" "$out/step.log" "$out/training.log" "$work/rest"
cp "$work"/training/*.log "$work/rest" 2>/dev/null
for run in "$work"/training/runs/*; do
  [ -d "$run" ] || continue
  mkdir -p "$work/rest/$(basename "$run")"
  cp "$run"/*.json* "$run"/*.yaml "$work/rest/$(basename "$run")"
done
tar -C "$work" -czf "$out/rest.tar.gz" rest
cat "$work/summary"
exit "$failed"
