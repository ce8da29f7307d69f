"""Answers in an object store: they are searched into this machine's cache, and uploaded when they are complete."""

import os

from facepipe import storage
from facepipe.hashing import hash64
from facepipe.storage.cache import get_cache_folder
from facepipe.storage.owned import delete_owned_folder
from pipelines.search.parts import owns_part


def locate_local_output(output: str) -> str:
    """Return where to write answers first: the output itself, or a path in the cache if the output is remote."""
    if not storage.is_remote(output):
        return output
    # The name depends on the output only, so that an interrupted run finds its finished blocks again.
    name = f"{hash64(output):016x}" + (".parquet" if output.endswith(".parquet") else "")
    return os.path.join(get_cache_folder(), "searches", name)


def upload_answers(local: str, output: str) -> None:
    """Upload complete answers to an object store and delete the local copy; do nothing for a local output."""
    if local == output:
        return
    # Delete the local copy last: if an upload fails, a later run uploads again without searching.
    if os.path.isdir(local):
        for name in sorted(os.listdir(local)):
            storage.write_file(storage.join(output, name), os.path.join(local, name))
        delete_owned_folder(local, owns_part)
    else:
        storage.write_file(output, local)
        storage.delete(local)
