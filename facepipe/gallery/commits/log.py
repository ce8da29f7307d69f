"""The log of the table: its entries are on disk before anyone can see them.

deltalake reads the log, and is what reads a gallery elsewhere. It never syncs what it writes to a local disk: after a
power cut an entry or a checkpoint may be empty, and the table is then unreadable or lacks rows. So entries are written
here, each as a new file that no other writer can replace. deltalake makes checkpoints only, in a folder of its own, and
they get their place in the log when they are on disk.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction

from facepipe import storage
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery.deletion_vectors import FEATURE, PROPERTY, Descriptor
from facepipe.storage import conditional
from facepipe.storage.aliases import find_table_path
from facepipe.storage.lease import Lease
from facepipe.storage.table_access import get_delta_options

LOG = "_delta_log"
"""Folder of the log in the table's folder."""

OUTDATED = "facepipeOutdated"
"""What an entry says of itself: name of the file of marks that its version no longer needs."""

JsonAction = dict[str, Any]
"""One line of an entry: the name of an action, and its fields."""

_CHECKPOINT_INTERVAL = 100
_KEEP_LOG = {
    "delta.logRetentionDuration": "interval 30 days",
    "delta.checkpointInterval": str(_CHECKPOINT_INTERVAL),
}
# Readers and writers of these versions of the protocol know all that facepipe's tables use.
_READER_VERSION = 1
_WRITER_VERSION = 2
# Features that every writer of this version has, by the names that later versions give them.
_OLD_FEATURES = ("appendOnly", "invariants")
_KNOWN_FEATURES = {*_OLD_FEATURES, FEATURE}
# With deletion vectors a table has the versions that name features one by one.
_FEATURES_READER_VERSION = 3
_FEATURES_WRITER_VERSION = 7

# What deltalake looks at first: the version of the newest checkpoint.
_HINT = "_last_checkpoint"
SCRATCH = ".checkpoint"
"""Where a checkpoint is made, in the table's folder. Readers pass over names that begin with a dot."""
UNFINISHED = re.compile(
    r"(?:\d{20}\.(?:json|checkpoint(?:\.\d+\.\d+)?\.parquet|crc)|_last_checkpoint)#\d+|_commit_[0-9a-f-]+\.json\.tmp"
    r"|\d{20}\.json\.[0-9a-f]{8}\.tmp|_last_checkpoint\.new"
)
"""The names of what a writer leaves in the log if it is killed in a commit."""
_CHECKPOINT_NAME = "{:020d}.checkpoint.parquet"
_VERSIONED = re.compile(r"(\d{20})\.(?:json|checkpoint(?:\.\d+\.\d+)?\.parquet)")

# Bytes of a log from which checkpoints are made in a process of their own.
_LARGE_LOG = 16 << 20
_CHECKPOINT_SCRIPT = """
import sys
from deltalake import DeltaTable
table = DeltaTable(sys.argv[1])
table.create_checkpoint()
print(table.version())
"""

# Checkpoints of a process are made in one scratch folder.
_one_at_a_time = threading.Lock()


# ---- entries


def write_entry(folder: str, version: int, operation: str, actions: Iterable[JsonAction], **info: Any) -> None:
    """Write an entry of the log. On a disk it survives a power cut from the moment at which readers can see it.

    Args:
        folder: path or URL of the table.
        version: version of the table that the entry makes.
        operation: what was done, in Delta's words.
        actions: what changes.
        info: what else the entry says of itself.

    Raises:
        ConflictError: another writer made this version.
        StorageError: the entry cannot be written.
    """
    commit_info = {
        "timestamp": _read_milliseconds(),
        "operation": operation,
        "operationParameters": {},
        "engineInfo": "facepipe",
        **info,
    }
    # Characters are written as they are: Arrow's reader of the log joins the two halves of an escaped one wrongly.
    lines = [
        json.dumps(action, separators=(",", ":"), ensure_ascii=False)
        for action in ({"commitInfo": commit_info}, *actions)
    ]
    log = storage.join(folder, LOG)
    # The files that the entry names are on disk, and so must be their names.
    if not storage.is_remote(folder):
        storage.sync_folder(folder)
    conditional.create(storage.join(log, f"{version:020d}.json"), "\n".join(lines).encode())


def create_log(folder: str, schema: Schema, name: str, configuration: Mapping[str, str]) -> None:
    """Write the first entry of a new table.

    Args:
        folder: path or URL of the table.
        schema: its columns.
        name: its name.
        configuration: its properties.

    Raises:
        ConflictError: there is a table.
        StorageError: the entry cannot be written.
        ConfigError: settings of the environment would leave the table unencrypted.
    """
    get_delta_options(folder)  # it checks them, and no table has been opened yet
    storage.make_folder(storage.join(folder, LOG))
    protocol = {"protocol": {"minReaderVersion": _READER_VERSION, "minWriterVersion": _WRITER_VERSION}}
    metadata = _make_metadata(
        str(uuid.uuid4()), schema, name=name, created=_read_milliseconds(), configuration={**_KEEP_LOG, **configuration}
    )
    write_entry(folder, 0, "CREATE TABLE", [protocol, metadata])


def add_columns(folder: str, table: DeltaTable, schema: Schema) -> None:
    """Write an entry that gives a table a wider schema.

    Args:
        folder: path or URL of the table.
        table: the table in its newest version.
        schema: its columns and the new ones, which may be null.

    Raises:
        ConflictError: another writer made the next version.
        GalleryError: another program has changed the table in a way that facepipe does not know.
    """
    require_known_protocol(folder, table)
    write_entry(folder, table.version() + 1, "ADD COLUMN", [_change_metadata(table, schema=schema)])


def set_property(folder: str, table: DeltaTable, name: str, value: str) -> None:
    """Write an entry that sets a property of a table.

    Args:
        folder: path or URL of the table.
        table: the table in its newest version.
        name: name of the property.
        value: its new value.

    Raises:
        ConflictError: another writer made the next version.
        GalleryError: another program has changed the table in a way that facepipe does not know.
    """
    require_known_protocol(folder, table)
    metadata = _change_metadata(table, configuration={name: value})
    write_entry(folder, table.version() + 1, "SET TBLPROPERTIES", [metadata])


def make_property_action(table: DeltaTable, properties: Mapping[str, str]) -> JsonAction:
    """Make the line of an entry that sets properties of a table, beside its other properties."""
    return _change_metadata(table, configuration=properties)


def _change_metadata(
    table: DeltaTable, *, schema: Schema | None = None, configuration: Mapping[str, str] | None = None
) -> JsonAction:
    """Make a table's metadata with another schema, or with properties that replace or join its own."""
    return _replace_configuration(table, {**table.metadata().configuration, **(configuration or {})}, schema)


def _replace_configuration(
    table: DeltaTable, configuration: Mapping[str, str], schema: Schema | None = None
) -> JsonAction:
    old = table.metadata()
    return _make_metadata(
        str(old.id), schema or table.schema(), name=old.name, created=old.created_time, configuration=configuration
    )


def require_known_protocol(folder: str, table: DeltaTable) -> None:
    """Require that a table uses nothing that this module cannot write. Raises GalleryError otherwise."""
    protocol = table.protocol()
    features = set(protocol.writer_features or ()) - _KNOWN_FEATURES
    is_known = protocol.min_reader_version <= _READER_VERSION and protocol.min_writer_version <= _WRITER_VERSION
    if features or not (is_known or protocol.writer_features):
        raise GalleryError(
            f"another program has changed the table {folder!r} to Delta protocol {protocol.min_reader_version}, "
            f"{protocol.min_writer_version} ({', '.join(sorted(features)) or 'no features named'}): facepipe writes "
            f"{_READER_VERSION}, {_WRITER_VERSION} only. Export its rows and adopt them into a new gallery"
        )


def has_deletion_vectors(table: DeltaTable) -> bool:
    """Tell whether a table may have deletion vectors."""
    return FEATURE in (table.protocol().reader_features or ())


def make_vector_actions(table: DeltaTable, properties: Mapping[str, str]) -> list[JsonAction]:
    """Make the lines of an entry that let a table have deletion vectors, and set its properties.

    Args:
        table: the table in its newest version.
        properties: properties to set.
    """
    protocol = table.protocol()
    writer_features = protocol.writer_features or _OLD_FEATURES
    upgrade = {
        "minReaderVersion": _FEATURES_READER_VERSION,
        "minWriterVersion": _FEATURES_WRITER_VERSION,
        "readerFeatures": sorted({*(protocol.reader_features or ()), FEATURE}),
        "writerFeatures": sorted({*writer_features, FEATURE}),
    }
    return [{"protocol": upgrade}, make_property_action(table, {PROPERTY: "true", **properties})]


def make_plain_actions(table: DeltaTable) -> list[JsonAction]:
    """Make the lines of an entry after which a table has no deletion vectors, and every reader of Delta reads it.

    Args:
        table: the table in its newest version, no file of which has a deletion vector.
    """
    others = {*(table.protocol().reader_features or ()), *(table.protocol().writer_features or ())} - _KNOWN_FEATURES
    if others:
        return []
    configuration = {name: value for name, value in table.metadata().configuration.items() if name != PROPERTY}
    protocol = {"protocol": {"minReaderVersion": _READER_VERSION, "minWriterVersion": _WRITER_VERSION}}
    return [protocol, _replace_configuration(table, configuration)]


def read_deletion_vectors(folder: str, version: int) -> dict[str, Descriptor]:
    """Read which files of a version have deletion vectors, as the log has them, by path.

    Args:
        folder: path or URL of the table.
        version: the version.

    Raises:
        StorageError: the log does not go back so far, or cannot be read.
    """
    vectors: dict[str, Descriptor] = {}
    first = 0
    # Begin with the newest checkpoint that is not newer than the version.
    checkpoints: dict[int, list[str]] = {}
    for name in storage.list_names(storage.join(folder, LOG)):
        match = _VERSIONED.fullmatch(name)
        if match and name.endswith(".parquet") and int(match[1]) <= version:
            checkpoints.setdefault(int(match[1]), []).append(name)
    if checkpoints:
        newest = max(checkpoints)
        first = newest + 1
        for name in checkpoints[newest]:
            vectors |= _read_checkpoint_vectors(storage.join(folder, LOG, name))
    entries = read_entries(folder, first - 1)
    for number in range(first, version + 1):
        actions = next(entries, None)
        if actions is None:
            raise StorageError(f"entry {number} of the log of {folder!r} is not there")
        removed = [action["remove"]["path"] for action in actions if "remove" in action]
        for path in removed:
            vectors.pop(unquote(path), None)
        for action in actions:
            add = action.get("add")
            if add and add.get("deletionVector"):
                vectors[unquote(add["path"])] = add["deletionVector"]
    return vectors


def _read_checkpoint_vectors(path: str) -> dict[str, Descriptor]:
    try:
        with storage.open_seekable(path) as handle, pq.ParquetFile(handle) as file:
            added = file.schema_arrow.field("add").type
            if added.get_field_index("deletionVector") < 0:
                return {}
            rows = file.read(["add.path", "add.deletionVector"])["add"].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error
    return {unquote(add["path"]): add["deletionVector"] for add in rows if add and add["deletionVector"]}


def encode_action(action: AddAction | RemoveAction, vector: Descriptor | None = None) -> JsonAction:
    """Encode an action for an entry. Its path is as the log has it; no name of ours needs an escape there.

    Args:
        action: the action.
        vector: the deletion vector of the file. A file is removed only if the vector is named that it has.
    """
    more = {"deletionVector": vector} if vector else {}
    if isinstance(action, RemoveAction):
        return {
            "remove": {
                "path": action.path,
                "dataChange": action.data_change,
                "deletionTimestamp": action.deletion_timestamp,
                "extendedFileMetadata": False,
                **more,
            }
        }
    return {
        "add": {
            "path": action.path,
            "partitionValues": {},
            "size": action.size,
            "modificationTime": action.modification_time,
            "dataChange": action.data_change,
            "stats": action.stats,
            **more,
        }
    }


def encode_transaction(run: str, number: int) -> JsonAction:
    """Encode the number of a run's commit, by which the table knows whether it took the commit."""
    return {"txn": {"appId": run, "version": number, "lastUpdated": _read_milliseconds()}}


def _make_metadata(
    table: str, schema: Schema, *, name: str | None, created: int | None, configuration: Mapping[str, str]
) -> JsonAction:
    return {
        "metaData": {
            "id": table,
            "name": name,
            "description": None,
            "format": {"provider": "parquet", "options": {}},
            "schemaString": schema.to_json(),
            "partitionColumns": [],
            "createdTime": created,
            "configuration": dict(configuration),
        }
    }


def _read_milliseconds() -> int:
    return int(time.time() * 1000)


def sync_log(folder: str) -> None:
    """Have what is seen of a log survive a power cut: a run that was killed may have left its last entry unsynced."""
    if not storage.is_remote(folder):
        storage.sync_folder(storage.join(folder, LOG))


def has_later_version(folder: str, version: int) -> bool:
    """Tell whether the log holds an entry or a checkpoint of a later version of the table."""
    names = storage.list_names(storage.join(folder, LOG), after=f"{version:020d}.json")
    return any(match and int(match[1]) > version for match in map(_VERSIONED.fullmatch, names))


def find_last_equal_version(folder: str, version: int) -> int:
    """Find the newest version that has the same files as a version: entries after it may add and remove nothing.

    Args:
        folder: path or URL of the table.
        version: a version whose next entries are still there, if there are any.
    """
    for actions in read_entries(folder, version):
        if any("add" in action or "remove" in action for action in actions):
            break
        version += 1
    return version


def find_last_version_of_rows(folder: str, version: int) -> int:
    """Find the newest version that has the same rows as a version, if in other files.

    Args:
        folder: path or URL of the table.
        version: a version whose next entries are still there, if there are any.
    """
    for actions in read_entries(folder, version):
        changes = [action.get("add") or action.get("remove") for action in actions]
        if any(change and change.get("dataChange", True) for change in changes):
            break
        version += 1
    return version


def read_entries(folder: str, version: int) -> Iterator[list[JsonAction]]:
    """Read the entries after a version, up to the first that is not there.

    Args:
        folder: path or URL of the table.
        version: the version.

    Yields:
        The actions of each entry.

    Raises:
        StorageError: an entry cannot be read.
    """
    while True:
        version += 1
        path = storage.join(folder, LOG, f"{version:020d}.json")
        entry = conditional.read_tagged(path)
        if entry is None:
            return
        try:
            yield [json.loads(line) for line in entry[0].splitlines() if line.strip()]
        except ValueError as error:
            raise StorageError(f"{path!r} is damaged: it is not an entry of a table's log") from error


def list_empty_entries(folder: str) -> list[str]:
    """List the entries and checkpoints that hold nothing, as a power cut leaves them where they were not synced."""
    base = storage.join(folder, LOG).rstrip("/") + "/"
    entries = ((entry.url.removeprefix(base), entry.size) for entry in storage.list_files(base))
    return [name for name, size in entries if not size and _VERSIONED.fullmatch(name)]


# ---- checkpoints


def is_checkpoint_due(version: int) -> bool:
    """Tell whether the table gets a checkpoint after this version, so that readers need not read every entry."""
    return (version + 1) % _CHECKPOINT_INTERVAL == 0


def write_checkpoint(folder: str, lease: Lease | None = None) -> int:
    """Write the state of a table's newest version as a checkpoint.

    After this returns, a disk holds checkpoint and hint also after a power cut, and older entries may go.

    Args:
        folder: path or URL of the table.
        lease: of the gallery.

    Returns:
        The version.

    Raises:
        GalleryBusyError: another run has taken the lease over.
        StorageError: the checkpoint cannot be written.
    """
    try:
        if storage.is_remote(folder):
            return _write_remote_checkpoint(folder, lease)
        with _one_at_a_time:
            return _write_local_checkpoint(folder, lease)
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot write a checkpoint of {folder!r}: {storage.describe_error(error)}") from error


def _write_remote_checkpoint(folder: str, lease: Lease | None) -> int:
    table = DeltaTable(folder, storage_options=get_delta_options(folder))
    if lease is not None:
        lease.renew()
    table.create_checkpoint()
    version = int(table.version())
    log = storage.join(folder, LOG)
    # A run that was killed may have written the checkpoint and not the hint. deltalake passes over both then.
    hint = storage.join(log, _HINT)
    found = conditional.read_tagged(hint)
    if found is None or _read_hinted_version(found[0]) != version:
        checkpoint = storage.read(storage.join(log, _CHECKPOINT_NAME.format(version)))
        storage.replace(hint, _make_hint(version, pa.BufferReader(checkpoint)))
    return version


def _write_local_checkpoint(folder: str, lease: Lease | None) -> int:
    """Make a checkpoint in a scratch folder, sync it, and put it into the log."""
    log = os.path.join(folder, LOG)
    parent = os.path.join(folder, SCRATCH)
    # What a run has left that was killed goes. One that was paused has lost its lease, and cannot go on without it.
    shutil.rmtree(parent, ignore_errors=True)
    scratch = os.path.join(parent, secrets.token_hex(4))
    try:
        # A table of links to the log's files: what is made there does not appear in the log.
        made = os.path.join(scratch, LOG)
        os.makedirs(made)
        _link_needed_files(log, made)
        version = _make_checkpoint(find_table_path(scratch), made)
        name = _CHECKPOINT_NAME.format(version)
        checkpoint = os.path.join(made, name)
        hint = os.path.join(scratch, _HINT)  # that in `made` may be a link to the present one
        # pyarrow itself takes no path that is not UTF-8.
        with open(checkpoint, "rb") as opened:
            Path(hint).write_bytes(_make_hint(version, opened))
        for file in (checkpoint, hint):
            storage.sync_file(file)
        # An older checkpoint would bring back what another run has deleted meanwhile. A run that takes the lease over
        # from here on deletes the scratch folder, before it deletes older entries.
        if lease is not None:
            lease.renew()
        # Put it into the log first, and let the hint name it then: a hint that leads nowhere stops every reader.
        for file in (checkpoint, hint):
            os.replace(file, os.path.join(log, os.path.basename(file)))
            storage.sync_folder(log)
        return version
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # another run has begun to make one
            os.rmdir(parent)


def _make_checkpoint(table: str, log: str) -> int:
    """Make a checkpoint of a table; return its version.

    Args:
        table: path of the table.
        log: path of its log.
    """
    if sum(entry.stat().st_size for entry in os.scandir(log)) < _LARGE_LOG:
        opened = DeltaTable(table)
        opened.create_checkpoint()
        return int(opened.version())
    # deltalake keeps what it has held, some 10 kB per file of the table. A process of its own gives it back.
    command = [sys.executable, "-c", _CHECKPOINT_SCRIPT, table]
    # In a session of its own, Ctrl-C does not end it: a commit is finished first.
    child = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise OSError(f"the process that makes it failed: {lines[-1]}")
    return int(child.stdout)


def _make_hint(version: int, checkpoint: "BinaryIO | pa.NativeFile") -> bytes:
    """Name a checkpoint to readers, by its version and the number of its actions.

    Args:
        version: its version.
        checkpoint: its file.
    """
    return json.dumps({"version": version, "size": pq.read_metadata(checkpoint).num_rows}).encode()


def _read_hinted_version(hint: bytes) -> int | None:
    """Read the version that a hint names. None if it names none."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(hint)["version"])
    return None


def _link_needed_files(log: str, folder: str) -> None:
    """Link the newest checkpoint and the entries after it; all files if no hint names a checkpoint."""
    first = 0
    with suppress(OSError):
        hinted = _read_hinted_version(Path(log, _HINT).read_bytes())
        if hinted is not None:
            first = hinted
            os.link(os.path.join(log, _HINT), os.path.join(folder, _HINT))
    for name in os.listdir(log):
        match = _VERSIONED.fullmatch(name)
        if match and int(match[1]) >= first:
            os.link(os.path.join(log, name), os.path.join(folder, name))
