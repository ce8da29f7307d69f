"""manifest.json: what a model was trained on, so that models trained on the data of a deleted person can be found.

Beside it, faces.npy holds the sorted ids of all faces that were trained on, for fast look-ups.
"""

import hashlib
import io
import json
import os
from typing import Any

import numpy as np

import facepipe
from facepipe import storage
from facepipe.storage.redact import redact
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.config import DataConfig
from facepipe.training.data.origin import hash_file
from facepipe.training.trainer.loop import Outcome
from facepipe.types import Int64

MANIFEST = "manifest.json"
FACES = "faces.npy"


def describe_embedder(data: DataConfig, whole: ChipSet, trained: ChipSet, held: ChipSet) -> dict[str, Any]:
    """Describe the data of an embedder for the manifest.

    Args:
        data: settings of the data.
        whole: all chips.
        trained: chips that were trained on.
        held: chips that were held out.
    """
    return {
        "data": whole.info.origin,
        "chips": whole.info.fingerprint,
        "images": len(trained),
        "identities": len(trained.identities),
        "held_images": len(held),
        "held_identities": len(held.identities),
        "figures": whole.info.figures,
        "excluded": {"galleries": list(data.exclude), "identities": data.exclude_identities},
        "faces_sha256": hashlib.sha256(_sort_face_ids(trained).tobytes()).hexdigest(),
        "uris_sha256": _hash_uris(trained),
    }


def describe_detector(annotations: str, steps_per_epoch: int) -> dict[str, Any]:
    """Describe the data of a detector for the manifest."""
    return {"data": {"annotations": annotations, "sha256": hash_file(annotations)}, "batches": steps_per_epoch}


def write_manifest(output: str, facts: dict[str, Any], outcome: Outcome, config: dict[str, Any]) -> None:
    """Write manifest.json.

    Args:
        output: folder of the run.
        facts: data, initial weights and scores.
        outcome: how the run ended.
        config: all settings; credentials are redacted.

    Raises:
        StorageError: The file cannot be written.
    """
    import torch

    # Settings may hold addresses with credentials, so the whole text is redacted.
    content = {
        "facepipe": facepipe.__version__,
        "torch": torch.__version__,
        **facts,
        "steps": outcome.step,
        "end": outcome.end,
        "config": config,
    }
    text = redact(json.dumps(content, indent=1, default=str))
    storage.write(os.path.join(output, MANIFEST), text.encode())


def write_faces(output: str, trained: ChipSet) -> None:
    """Write faces.npy: the ids of the chips that were trained on, (n,) int64, ascending."""
    buffer = io.BytesIO()
    np.save(buffer, _sort_face_ids(trained))
    storage.write(os.path.join(output, FACES), buffer.getvalue())


def _sort_face_ids(chips: ChipSet) -> Int64:
    return np.sort(np.asarray(chips.face_ids, np.int64))


def _hash_uris(chips: ChipSet) -> str:
    """Compute the SHA-256 of the uris, each followed by a zero byte, in the set's order: by label and face id."""
    digest = hashlib.sha256()
    for uri in chips.uris:
        digest.update(uri.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
