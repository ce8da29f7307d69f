"""The folder of a training: which files in it are ours, and how those of an earlier run are deleted.

Anybody may name any folder as `run.output`. So a run marks the folder first, and refuses one in which files of somebody
else have the names of its own.
"""

import json
import os
import re

from facepipe import storage
from facepipe.errors import ConfigError
from facepipe.storage.owned import delete_owned
from facepipe.training.trainer import checkpointing, metrics_log
from pipelines.train.manifest import FACES, MANIFEST

MODEL = "model"
REPORT = "report.html"
_MARKER = ".facepipe-training"
_FILES = (metrics_log.METRICS, REPORT, MANIFEST, FACES, f"{MODEL}.toml", f"{MODEL}.safetensors")
_CURVES = re.compile(r"events\.out\.tfevents\.[^/]+")


def prepare_output(output: str) -> None:
    """Make the folder of a training, and mark it as ours.

    Raises:
        ConfigError: a file in it has the name of one of ours, and no training wrote it.
        StorageError: the folder cannot be written.
    """
    storage.make_folder(output)
    marker = os.path.join(output, _MARKER)
    if not os.path.isfile(marker) and not _is_of_older_version(output):
        foreign = [name for name in _list_own_names(output) if os.path.lexists(os.path.join(output, name))]
        if foreign:
            raise ConfigError(
                f"run.output={output!r} holds {foreign[0]!r}, which no training wrote: choose another folder"
            )
    storage.replace(marker, b"The outputs of a training of facepipe lie here. `train --fresh` deletes them.\n")


def _list_own_names(output: str) -> list[str]:
    """List the names that a training may write to or delete in its folder."""
    folder = os.path.join(output, checkpointing.FOLDER)
    checkpoints = [name for name in storage.list_names(folder) if checkpointing.is_own_name(name)]
    return [*_FILES, *(f"{checkpointing.FOLDER}/{name}" for name in sorted(checkpoints))]


def _is_of_older_version(output: str) -> bool:
    """Tell whether a folder without a mark holds a training of an older facepipe."""
    folder = checkpointing.CheckpointFolder(output)
    if any(checkpointing.is_checkpoint(path) for path in folder.list_paths()):
        return True
    try:
        with open(os.path.join(output, MANIFEST), encoding="utf-8") as file:
            return {"facepipe", "torch", "steps"} <= set(json.load(file))
    except (OSError, ValueError, TypeError):
        return False


def delete_outputs(output: str) -> None:
    """Delete the outputs of an earlier run, except its chips. Files of somebody else stay."""
    # Checkpoints go first: without them no later run resumes from what is half deleted.
    checkpointing.CheckpointFolder(output).clear()
    for name in _FILES:
        storage.delete(os.path.join(output, name))
    curves = os.path.join(output, metrics_log.TENSORBOARD)
    if os.path.isdir(curves) and not os.path.islink(curves):
        delete_owned(curves, lambda name: bool(_CURVES.fullmatch(name)))
