#!/usr/bin/env bash
# Everything that needs a GPU: tests, timings beside their peers, recall. Runs from a checkout, installed or not.
#
#   benchmarks/gpu.sh OUT                      # all of it, about an hour
#   benchmarks/gpu.sh OUT tests tiles recall   # some of it
#
# Leaves STAGE.log and STAGE.json in OUT and ends with a table: each stage's exit code, seconds and last line.
# PYTHON chooses the interpreter; LIMIT is the most seconds a stage may take (default 560).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3} limit=${LIMIT:-560}
out=${1:?usage: benchmarks/gpu.sh OUT [STAGE ...]}
shift
stages=(tests attention tiles decode configurations embedding loss prefill serving training longest quality recall)
mkdir -p "$out"

command_of() {
  case $1 in
    tests) echo "-m pytest -m gpu tests/kernels tests/inference tests/test_checkpoint.py -n 8 -q --tb=short -p no:cacheprovider" ;;
    attention) echo "-m andromeda bench attention --seconds $((limit - 60)) --json $out/attention.json" ;;
    tiles) echo "-m andromeda bench attention --lengths 32768 --no-peers --sweep --seconds $((limit - 60)) --json $out/tiles.json" ;;
    decode) echo "-m andromeda bench decode --json $out/decode.json" ;;
    configurations) echo "-m andromeda bench decode --sweep --json $out/configurations.json" ;;
    embedding | loss) echo "-m andromeda bench $1 --json $out/$1.json" ;;
    prefill) echo "-m andromeda bench prefill --breakdown --seconds $((limit - 60)) --json $out/prefill.json" ;;
    serving) echo "-m andromeda bench serving --seconds $((limit - 60)) --json $out/serving.json" ;;
    training)
      rows=(ours:2b:8192 ours:2b:8192:compile:4 ours:2b:8192:compile:fp8:4 qwen3:2b:8192:2 qwen3:2b:8192:compile ours:2b:32768:compile qwen3:2b:32768:full ours:2b:131072:full)
      echo "-m andromeda bench training ${rows[*]/#/--only } --seconds $((limit - 60)) --json $out/training.json" ;;
    longest)
      rows=(ours:2b:300000:full:adamw8bit ours:700m:655360:full:adamw8bit ours:400m:1000000:full:adamw8bit)
      echo "-m andromeda bench training --once ${rows[*]/#/--only } --seconds $((limit - 60)) --json $out/longest.json" ;;
    quality) echo "benchmarks/fp8_quality.py --json $out/quality.json" ;;
    recall) echo "benchmarks/recall.py --jobs 8 --out $out" ;;
    *) return 1 ;;
  esac
}

table=() failed=0
for stage in "${@:-${stages[@]}}"; do
  call=$(command_of "$stage") || { echo "gpu.sh: no stage $stage; there are ${stages[*]}" >&2; exit 2; }
  echo "== $stage: $python $call"
  # A card is filled to the last GiB only where what is free is one piece.
  [[ $stage != longest ]] || export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  began=$SECONDS
  # shellcheck disable=SC2086 - the words of a command
  timeout "$limit" "$python" $call 2>&1 | tee "$out/$stage.log"
  code=${PIPESTATUS[0]}
  [[ $code == 0 ]] || failed=1
  table+=("$(printf '%-15s exit %3d %5d s  %s' "$stage" "$code" $((SECONDS - began)) "$(tail -n 1 "$out/$stage.log" | cut -c 1-100)")")
done
printf '%s\n' "" "${table[@]}"
exit "$failed"
