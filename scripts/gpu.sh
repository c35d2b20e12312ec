#!/usr/bin/env bash
# Tests and measures metalit on a GPU in less than eight minutes, without a network.
#
#   scripts/gpu.sh [--device cpu] [--wheels FOLDER] [--output FOLDER]
#
# It needs Python 3.11 or newer as python3, a CUDA build of torch >= 2.11 with Triton, and whatever of the packages in
# pyproject.toml is not there already, as wheels in FOLDER (.gpu-wheels, if not given). Where there is a network:
#
#   pip download --no-deps --only-binary=:all: -d .gpu-wheels lightning==2.6.6 pytorch-lightning==2.6.6 \
#       lightning-utilities==0.15.3 torchmetrics==1.9.0 jsonargparse==4.53.0 omegaconf==2.4.0 \
#       docstring_parser==0.18.0 typeshed_client==2.14.0
#
# which are 4 MB. FOLDER of --output (benchmarks, if not given) gets gpu.json, the page gpu.md, and the log of the tests,
# gpu_tests.log; all are written as results come. --device cpu tries everything out in tiny sizes, without a GPU; there
# most of the time goes to the C++ compiler, and nothing holds it to eight minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda wheels=.gpu-wheels output=benchmarks
while (($#)); do
    case "$1" in
        --device) device=$2 ;;
        --wheels) wheels=$2 ;;
        --output) output=$2 ;;
        *) echo "scripts/gpu.sh: there is no option $1; there are --device, --wheels and --output" >&2; exit 2 ;;
    esac
    shift 2
done

# of the whole, of the tests, and how many of them run at the same time where pytest-xdist is there
seconds=${GPU_SECONDS:-450} tests_seconds=${GPU_TESTS_SECONDS:-210} processes=8
if [ "$device" = cpu ]; then seconds=${GPU_SECONDS:-2400} tests_seconds=${GPU_TESTS_SECONDS:-1500} processes=2; fi
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$wheels"/*.whl
    export PYTHONPATH=$work/site:$PYTHONPATH
fi
# several processes compile at the same time; what they compile is of this run alone
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2
export TORCHINDUCTOR_CACHE_DIR=$work/programs METALIT_DEVICE=$device METALIT_GPU_RESULTS=$output/gpu_tests.jsonl
mkdir -m 700 "$TORCHINDUCTOR_CACHE_DIR"
rm -f "$METALIT_GPU_RESULTS"

"$python" - <<'PYTHON'
import sys, torch
import metalit.cli.command_line, metalit.modules  # what is missing is told here, before anything is waited for
gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {gpu}")
PYTHON

begun=$SECONDS status=0
workers=()
if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n "$processes" --maxschedchunk 1); fi
timeout --kill-after=5 "$tests_seconds" "$python" -m pytest -m gpu -p no:cacheprovider -ra --tb=short \
    "${workers[@]}" tests/gpu > "$output/gpu_tests.log" 2>&1 || status=$?
tail -n 25 "$output/gpu_tests.log"
echo "tests: exit status $status after $((SECONDS - begun)) s"

left=$((seconds - SECONDS))
export TORCHINDUCTOR_COMPILE_THREADS=4
timeout --kill-after=5 "$((left + 25))" "$python" -m benchmarks gpu --device "$device" --seconds "$left" \
    --output "$output/gpu.json" --tests "$METALIT_GPU_RESULTS" || status=$?
cat "$output/gpu.md"
echo "all: exit status $status after $SECONDS s; $output/gpu.json, $output/gpu.md"
exit "$status"
