#!/bin/sh
# Writes each overlay's nightly-rayjob.yaml, which the CronJob mounts. kustomize can put a file into a ConfigMap, but not its own
# output. tests/test_infra.py fails if the files differ from what this script writes.
set -eu
cd "$(dirname "$0")/overlays"
for overlay in *; do
    built=$(kubectl kustomize "$overlay/jobs")
    {
        echo "# Written by infra/kubernetes/render.sh from overlays/$overlay/jobs."
        # Every night has its own name, so that last night's job stays for inspection.
        echo "$built" \
            | awk 'BEGIN { RS = "---\n"; ORS = "" } /\n  name: facepipe-nightly\n/' \
            | sed 's/^  name: facepipe-nightly$/  generateName: facepipe-nightly-/'
    } > "$overlay/nightly-rayjob.yaml"
done
