#!/bin/sh
# Writes each overlay's nightly-rayjob.yaml, which the CronJob mounts: kustomize can put a file into a ConfigMap, but not what
# it has built itself. tests/test_infra.py fails when these files are not what this script writes.
set -eu
cd "$(dirname "$0")/overlays"
for overlay in *; do
    built=$(kubectl kustomize "$overlay/jobs")
    {
        echo "# Written by infra/kubernetes/render.sh from overlays/$overlay/jobs."
        # A name of its own for every night: last night's job stays to be looked at.
        echo "$built" \
            | awk 'BEGIN { RS = "---\n"; ORS = "" } /\n  name: facepipe-nightly\n/' \
            | sed 's/^  name: facepipe-nightly$/  generateName: facepipe-nightly-/'
    } > "$overlay/nightly-rayjob.yaml"
done
