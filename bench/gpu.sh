#!/usr/bin/env bash
# Proves, tunes and times the Triton kernels on this machine's GPU, in calls of less than ten minutes each.
#
#   bench/gpu.sh [--out DIR] [--from DIR] [--seconds N] [--rehearse] [--plan] [--only STAGE,...] [--again STAGE,...]
#
# Call it until it says that all is done: each call takes up where the last one stopped. --plan says which calls there will be and
# what each does. Results go to at most eight files in DIR, $OUT where that is set, else bench/results/gpu-run; the summary comes last.
# --from DIR starts from what an earlier call left elsewhere, --again does stages anew, --only does no others, --seconds is for a
# call (560). Each stage is a process with a time limit of its own, so that a failure or a hang takes nothing else along. --rehearse
# goes through all of them without a GPU: Triton's interpreter, tiny sizes. Stage by stage: bench/gpu/.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results/gpu-run} from='' seconds=560 rehearse='' plan='' only='' again=''
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --from) from=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --rehearse) rehearse=--rehearse seconds=7200; export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=; shift ;;
        --plan) plan=1; shift ;;
        --only) only=$2; shift 2 ;;
        --again) again=$2; shift 2 ;;
        *) echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-$(command -v python3 || command -v python)}
mkdir -p "$out" || exit 1
gpu() { "$python" -S bench/gpu "$@" --out "$out"; }
[ -z "$from" ] || cp "$from"/*.* "$out"/ || exit 1
[ -z "$again" ] || gpu forget --stages "$again" || exit 1
gpu plan --seconds "$seconds" || exit 1
[ -z "$plan" ] || exit 0

failed=0 tried=''
while read -r stage limit < <(gpu next --seconds $((seconds - SECONDS)) --stages "$only" --tried "$tried") && [ "$stage" ]; do
    [ -z "$rehearse" ] || limit=900 # the machine may be busy
    began=$SECONDS
    timeout -k 5 "$limit" "$python" bench/gpu "$stage" --out "$out" --limit "$limit" $rehearse >>"$out/log.txt" 2>&1
    status=$?
    case $status in 0 | 75 | 124 | 137) ;; *) failed=1 ;; esac # 75: there is more to do; 124, 137: out of time
    gpu record --ended "$stage:$status:$((SECONDS - began))" || failed=1
    echo "$stage: status $status, $((SECONDS - began)) s"
    tried=$tried,$stage
done
gpu summary || failed=1
exit $failed
