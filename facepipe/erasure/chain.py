"""The chain of a gallery's receipts: each holds the checksum of the one before, and a small file that of the newest.

Without a key it shows mistakes: a receipt that is missing, cut short or edited. With a key nobody can forge it without
the key. That the newest receipts are there can only be seen by copies of them elsewhere.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from facepipe import storage
from facepipe.erasure import pending
from facepipe.erasure.receipt import Receipt, get_receipt_path, parse_receipt
from facepipe.errors import ConfigError, GalleryError, StorageError
from facepipe.gallery.suppressed import get_erased_folder, write_erased_file
from facepipe.storage import conditional

_HEAD = "receipts.head"
_ENDING = ".json"
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class Link:
    """A receipt by id, and the checksum of its file; empty texts for none."""

    id: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class _Head:
    """The newest receipt, and the one before it.

    The head is written before its receipt. If a crash comes in between, the receipt is made again: after the same one,
    or at the end if others have taken its place.
    """

    newest: Link
    previous: Link


def save_receipt(gallery: str, receipt: Receipt) -> str:
    """Put a receipt at the end of the gallery's chain, and write it. The path is returned.

    Raises:
        ConfigError: the receipt was made with a key that is not set.
    """
    path = storage.join(get_erased_folder(gallery), _HEAD)
    storage.make_parent_folder(path)
    for _ in range(_MAX_ATTEMPTS):
        tagged = conditional.read_tagged(path)
        head = _decode_head(tagged[0], path) if tagged else None
        previous = Link()
        if head is not None:
            is_unwritten = head.newest.id == receipt.id or _is_unwritten(gallery, head.newest)
            previous = head.previous if is_unwritten else head.newest
        receipt.previous = previous.id
        receipt.previous_sha256 = previous.sha256
        # Receipts of older versions are named once, by the first one that has a place in the chain.
        receipt.older = {} if previous.id else dict(_compute_checksums(gallery, receipt.id))
        receipt.sign()
        data = receipt.encode()
        try:
            _write_head(path, _Head(Link(receipt.id, _compute_checksum(data)), previous), tagged[1] if tagged else None)
        except conditional.ConflictError:
            continue  # another run has finished an erasure just now
        written = write_erased_file(gallery, receipt.id + _ENDING, data)
        # Another run may have taken the receipt for one that a crash prevented, and then its place.
        if receipt.id in _list_newest(gallery):
            return written
    raise StorageError(f"cannot write {path!r}: others keep changing it; run the same command again")


def _is_unwritten(gallery: str, link: Link) -> bool:
    """Tell whether a receipt that the head names was never written: its erasure is not complete."""
    is_missing = not storage.file_exists(get_receipt_path(gallery, link.id))
    return is_missing and pending.is_pending(gallery, link.id)


def _list_newest(gallery: str) -> list[str]:
    """List the newest receipts of the chain, as many as others can have added while one is written."""
    tagged = conditional.read_tagged(storage.join(get_erased_folder(gallery), _HEAD))
    ids: list[str] = []
    link = _decode_head(tagged[0], _HEAD).newest if tagged else Link()
    while link.id and len(ids) < _MAX_ATTEMPTS:
        ids.append(link.id)
        receipt, _ = _read_link(gallery, link)
        link = Link(receipt.previous, receipt.previous_sha256) if receipt is not None else Link()
    return ids


def _write_head(path: str, head: _Head, tag: str | None) -> None:
    content = {
        "id": head.newest.id,
        "sha256": head.newest.sha256,
        "previous": head.previous.id,
        "previous_sha256": head.previous.sha256,
    }
    conditional.write_if(path, json.dumps(content).encode(), tag)


def _decode_head(data: bytes, path: str) -> _Head:
    try:
        content = json.loads(data)
        texts = [content[name] for name in ("id", "sha256", "previous", "previous_sha256")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("not texts")
    except (ValueError, TypeError, KeyError) as error:
        raise GalleryError(
            f"{path!r}, which names the newest receipt, is damaged: take it from a backup, or delete it to begin a new "
            "chain of receipts"
        ) from error
    return _Head(Link(texts[0], texts[1]), Link(texts[2], texts[3]))


def _compute_checksums(gallery: str, own: str) -> Iterator[tuple[str, str]]:
    """Compute the checksums of all other receipts, by id."""
    folder = get_erased_folder(gallery).rstrip("/") + "/"
    for entry in storage.list_files(folder.rstrip("/")):
        name = entry.url.removeprefix(folder)
        if name.endswith(_ENDING) and "/" not in name and name != own + _ENDING:
            yield name.removesuffix(_ENDING), _compute_checksum(storage.read(entry.url))


def _compute_checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Chain:
    """What the chain of a gallery says.

    Attributes:
        checksums: of the receipts' files, by id, as later receipts have them.
        signed: ids of receipts that a later one vouches for which is signed with the key that is set.
        problems: receipts that are missing or were altered.
    """

    checksums: dict[str, str]
    signed: frozenset[str]
    problems: tuple[str, ...]


def read_chain(gallery: str) -> Chain:
    """Walk the chain from the newest receipt to the first, and check each.

    Raises:
        GalleryError: the file that names the newest receipt is damaged.
    """
    checksums: dict[str, str] = {}
    signed: set[str] = set()
    problems: list[str] = []
    path = storage.join(get_erased_folder(gallery), _HEAD)
    tagged = conditional.read_tagged(path)
    link = _decode_head(tagged[0], path).newest if tagged else Link()
    while link.id and link.id not in checksums:
        checksums[link.id] = link.sha256
        receipt, problem = _read_link(gallery, link)
        if problem:
            problems.append(problem)
        if receipt is None:
            break
        checksums |= receipt.older
        if receipt.mac and not problem:
            signed.update({receipt.id, receipt.previous, *receipt.older})
        link = Link(receipt.previous, receipt.previous_sha256)
        for older, checksum in receipt.older.items():
            problems += filter(None, [_read_link(gallery, Link(older, checksum))[1]])
    return Chain(checksums, frozenset(signed), tuple(problems))


def _read_link(gallery: str, link: Link) -> tuple[Receipt | None, str]:
    """Read a receipt of the chain, and say what is wrong with it."""
    name = f"erased/{link.id}{_ENDING}"
    content = conditional.read_tagged(get_receipt_path(gallery, link.id))
    if content is None:
        return None, f"{name}: the receipt is missing, and later ones name it"
    try:
        receipt = parse_receipt(content[0], name)
        if _compute_checksum(content[0]) != link.sha256:
            return receipt, f"{name}: the receipt was altered: its checksum is not the one that was noted"
        if receipt.mac and not receipt.is_signature_right():
            return receipt, f"{name}: the receipt was altered: its signature is not right"
    except ConfigError as error:
        return None, str(error)
    return receipt, ""
