#!/usr/bin/env bash
# The large networks, a slice of time at a time: each call goes on where the last one stopped.
#
#   tests/studies/large.sh DATA_ROOT RUNS WHOLE_MINUTES [OPTION OF robust-app train ...]
#   tests/studies/large.sh data runs/large 9 --execution graph
#
# A run that is cut off loses the epoch that it was in. MODELS, CHOICES and METHODS choose
# among the runs; PYTHON is the interpreter. Ends with 0 when everything is done, with 75 when time ran out.
set -euo pipefail
if [[ $# -lt 3 || ! $3 =~ ^[0-9]+$ ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$1 runs=$2 end=$(($(date +%s) + 60 * 10#$3))
shift 3
python=${PYTHON:-python3}

within_time() {
    local left=$((end - $(date +%s))) status=0
    if ((left < 1)); then exit 75; fi
    timeout "$left" "$@" || status=$?
    if ((status == 124)); then exit 75; fi
    return "$status"
}

for model in ${MODELS:-dm-large dm-medium}; do
    for choice in ${CHOICES:-mnist-0.4 cifar10-8-255 cifar10-16-255}; do
        for method in ${METHODS:-advibp advcrown-ibp weighted-sum}; do
            recipe=${choice%%-*}-$model-${choice#*-}-$method-short
            run=$runs/$recipe
            if [[ -e $run/done ]]; then continue; fi
            how=(--recipe "$recipe")
            if [[ -e $run/config.toml ]]; then how=(--resume); fi
            within_time "$python" -m robust_app train --data-root "$data" --run-dir "$run" "${how[@]}" "$@"
            if [[ $choice == mnist-0.4 ]]; then # one training serves both radii
                within_time "$python" -m robust_app evaluate "$run" --epsilon 0.3
            fi
            touch "$run/done"
        done
    done
done
