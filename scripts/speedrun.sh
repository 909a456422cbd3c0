#!/usr/bin/env bash
# The paper's mDPO run on LLaVA-1.5-7B from nothing to the table: download, check, train, answer and score, report,
# certificate; the wall-clock of each part stands in OUT/wall-clock.txt.
#
#     scripts/speedrun.sh                                          needs a network, one GPU and the benchmarks' files
#     JUDGE="--judge URL --judge-model M" scripts/speedrun.sh      MMHal-Bench too, which needs a judge (docs/evaluation.md)
#     BASE=toy scripts/speedrun.sh                                 the same steps in a toy world, on a CPU, in minutes
#
# The real run has not been made yet: nobody has had the GPU. The toy one is tested, in a small world. A run that was
# stopped is resumed by the same command: what is there is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
BASE=${BASE:-llava-1.5-7b}
OUT=${OUT:-runs/speedrun-$BASE}
BENCHMARKS=${BENCHMARKS:-benchmarks}
read -ra judge <<< "${JUDGE:-}"
read -ra more <<< "${TRAIN:-}" # further flags of train.py
run=$OUT/run
command -v "$PYTHON" > /dev/null || { echo "$PYTHON: not there; PYTHON=... names one that has the requirements" >&2; exit 1; }
mkdir -p "$OUT"

part() { # part NAME COMMAND...: runs it and notes how long it took
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    "$@"
    echo "$name $((SECONDS - start)) s" | tee -a "$OUT/wall-clock.txt"
}

if [ "$BASE" = toy ]; then
    export OMP_NUM_THREADS=1 # models this small lose by a second thread
    world=$OUT/toy-world-0
    base=$world/base
    data=$world/pairs/train.jsonl
    part download "$PYTHON" -c "import pathlib, sys, toy; toy.make_world(pathlib.Path(sys.argv[1]), seed=0)" "$world"
else
    base=$BASE
    data=mdpo-10k
    table=(--base "$base" --data "$BENCHMARKS" "${judge[@]}")
    if [ ${#judge[@]} -eq 0 ]; then table+=(--parts objhal amber); fi
    # what is missing for the table is said now, not after hours of training
    "$PYTHON" -c "import sys; from evals import table1; table1.check_ready(table1.parse_args(sys.argv[1:]))" \
        "${table[@]}" --out "$OUT/base"
    part download "$PYTHON" -c "from bases import checkpoint; from formats import hub_data; checkpoint.resolve('$BASE'); hub_data.fetch('$data')"
fi

part check "$PYTHON" -m formats.check "$data" --base "$base"

resume=()
if [ -e "$run/args.json" ]; then resume=(--resume); fi
if [ ! -e "$run/adapter_model.safetensors" ]; then
    part train "$PYTHON" train.py --base "$BASE" --data "$data" --out "$run" "${more[@]}" "${resume[@]}"
fi

if [ "$BASE" = toy ]; then # its own table was printed after training and stands in run/table.json
    part answer "$PYTHON" -m evals.answers --base "$base" --adapter "$run" --questions "$world/pairs/held-out.jsonl" \
        --out "$OUT/answers.jsonl" --max-new-tokens 40
    part report "$PYTHON" -m lab.report "$run" --curves "$OUT/curves.svg"
else
    part answer-and-score "$PYTHON" -m evals.table1 "${table[@]}" --adapter "$run"
    part answer-and-score-base "$PYTHON" -m evals.table1 "${table[@]}" --out "$OUT/base"
    part report "$PYTHON" -m lab.report "$OUT/base" "$run" --table --curves "$OUT/curves.svg"
fi

part certificate "$PYTHON" -m bench.certificate --run "$run" --base "$base" --data "$data" --out "$OUT/certificate.json"
cat "$OUT/wall-clock.txt"
