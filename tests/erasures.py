"""Galleries with everything that an erasure has to clean, and a search for what it leaves behind."""

import base64
import csv
import io
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench.galleries import Faces, append
from bench.galleries import rows as drawn

from facepipe.config import build
from facepipe.erasure import receipt
from facepipe.erasure.proof import check_erased
from facepipe.erasure.selection import Selection, select_images
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.hashing import compute_face_id
from facepipe.index import manifest
from facepipe.index.search import Index
from facepipe.index.update import find_changes
from facepipe.index.verify import verify_index
from facepipe.schema import FACES
from pipelines import clean, index
from pipelines.cluster import pipeline as cluster
from pipelines.dedup import pipeline as dedup

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
PERSONS, EACH = 30, 6
JANE = 'Jane "J" <b>Doe</b>, and\nSon: a & b'
PLANTED = {0: JANE, 1: "keep", 2: "A and B: one person?", 3: "12"}


def name_of(person: int) -> str:
    return PLANTED.get(person, f"person {person} of many")


def uri_of(person: int, n: int) -> str:
    odd = {0: "file:///data/a%FF'\"<i>/", 1: "/data/k\nb/"}.get(person, "/data/")
    return f"{odd}p{person:03d}/image {n}.jpg"


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    return cv2.imencode(".jpg", noise)[1].tobytes()


def people(persons: np.ndarray, first: int = 0, **columns: list[Any]) -> pa.Table:
    """Rows of faces of these persons with labels, uris, thumbnails and picture hashes of their own."""
    made = drawn(persons, Faces().draw(persons, first), first)
    numbers = range(first, first + len(persons))
    hashes = np.random.default_rng(first).integers(-(2**62), 2**62, len(persons))
    values: dict[str, list[Any]] = {
        "uri": [uri_of(p, n) for p, n in zip(persons.tolist(), numbers, strict=True)],
        "identity": [name_of(p) for p in persons.tolist()],
        "source": ["corpus"] * len(persons),
        "thumb": [picture(n) for n in numbers],
        "image_hash": hashes.tolist(),
        "face_px": [90.0] * len(persons),
        "sharpness": [100.0] * len(persons),
        "width": [100] * len(persons),
        "height": [100] * len(persons),
        "ingested_at": [datetime(2026, 11, 1, tzinfo=UTC) + timedelta(minutes=first)] * len(persons),
        **columns,
    }
    for name, some in values.items():
        at = made.schema.get_field_index(name)
        made = made.set_column(at, made.schema.field(at), pa.array(some, made.schema.field(at).type))
    return identified(made.to_pylist())


def identified(rows: list[dict[str, Any]]) -> pa.Table:
    """With the face ids that these images' faces have."""
    return pa.Table.from_pylist(
        [{**r, "face_id": compute_face_id(r["uri"], r["image_id"], r["face_index"])} for r in rows], FACES
    )


def reported(path: Path, *, with_reports: bool = True) -> Gallery:
    """30 persons of 6 photos in three files, with an index and every report. Two photos of person 0 are copied: one
    byte by byte under another person's name, one resized; a label of person 5 is person 0's."""
    rng = np.random.default_rng(0)
    persons = rng.permutation(np.repeat(np.arange(PERSONS), EACH))
    made = people(persons)
    table = made.to_pylist()
    mine = [n for n, p in enumerate(persons) if p == 0]
    exact = {**table[mine[0]], "uri": "/elsewhere/copy.jpg", "identity": name_of(7)}
    near = {**table[mine[1]], "uri": "/elsewhere/small.jpg", "identity": name_of(8)}
    turned = np.array(near["embedding"], np.float32) + np.float32(1e-3)
    near |= {"embedding": (turned / np.linalg.norm(turned)).tolist(), "thumb": picture(999)}
    near |= {"image_id": "8" * 32, "width": 10, "height": 10, "image_hash": table[mine[1]]["image_hash"] ^ 1}
    table[next(n for n, p in enumerate(persons) if p == 5)]["identity"] = JANE
    parts = [table[:60], table[60:120], [*table[120:], exact, near]]
    gallery = Gallery.create(str(path), DLIB)
    append(gallery, [identified(part) for part in parts], "20261101T000000-000000")
    index.run(index.IndexConfig(), gallery.path)
    if not with_reports:
        return Gallery(gallery.path)
    dedup.run(build(dedup.DedupConfig), gallery.path)
    cluster.run(build(cluster.ClusterConfig), gallery.path)
    clean.run(build(clean.CleanConfig), gallery.path)
    shutil.rmtree(path / "runs", ignore_errors=True)
    return Gallery(gallery.path)


def tree(path: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def table_rows(gallery: Gallery) -> list[dict[str, Any]]:
    found = Gallery(gallery.path).to_arrow().to_pylist()
    return sorted(found, key=lambda row: (row["uri"], row["face_index"] or 0))


class Traces:
    """What rows would leave behind: texts, ids, vectors, thumbnails, and the forms that these take in files."""

    def __init__(self, rows: list[dict[str, Any]], names: set[str]):
        uris = {row["uri"] for row in rows}
        self.texts = uris | names | {row["image_id"] for row in rows if row["image_id"]}
        self.ids = {row["face_id"] for row in rows if row["face_id"] is not None}
        vectors = [np.array(row["embedding"], "<f4").tobytes() for row in rows if row["embedding"]]
        thumbs = [row["thumb"] for row in rows if row["thumb"]]
        self.vectors, self.thumbs = set(vectors), set(thumbs)
        written = {form for text in uris | {n for n in names if len(n) > 4} for form in self._forms(text)}
        ids = {part for n in self.ids if n > 1000 for part in (n.to_bytes(8, "little"), str(n).encode())}
        self.needles = written | ids | self.vectors | self.thumbs | {base64.b64encode(t) for t in thumbs}

    @staticmethod
    def _forms(text: str) -> set[bytes]:
        quoted = io.StringIO()
        csv.writer(quoted).writerow([text])
        spelt = json.dumps(text)[1:-1]
        return {
            text.encode(),
            spelt.encode(),
            spelt.replace("<", "\\u003c").encode(),
            quoted.getvalue().strip().encode(),
        }

    def in_bytes(self, data: bytes) -> list[bytes]:
        return [needle[:60] for needle in self.needles if needle in data]

    def in_values(self, value: Any) -> list[Any]:
        """In what a Parquet file holds, at any depth."""
        if isinstance(value, str):
            if value.startswith("{"):
                return self.in_values(json.loads(value))
            return [value] if value in self.texts or self.in_bytes(value.encode()) else []
        if isinstance(value, bytes):
            return [value] if value in self.thumbs else []
        if isinstance(value, int) and not isinstance(value, bool):
            return [value] if value in self.ids else []
        if isinstance(value, dict):
            words = ("decision", "reason", "kind", "badge")  # of ours
            return [hit for key, inner in value.items() if key not in words for hit in self.in_values(inner)]
        if isinstance(value, list):
            if len(value) == 128 and all(isinstance(x, float) for x in value):
                return [value] if np.array(value, "<f4").tobytes() in self.vectors else []
            return [hit for inner in value for hit in self.in_values(inner)]
        return []

    def anywhere(self, files: dict[str, bytes]) -> dict[str, list[Any]]:
        """By file; Parquet and npz are decoded."""
        found = {}
        for name, data in files.items():
            hits: list[Any] = list(self.in_bytes(data))
            if len(data) > 12 and data[:4] == b"PAR1" and data[-4:] == b"PAR1":
                whole = pq.read_table(pa.BufferReader(data))
                hits += self.in_values(whole.to_pylist())
                hits += self.in_bytes(b"".join((whole.schema.metadata or {}).values()))
            elif name.endswith(".npz"):
                with np.load(io.BytesIO(data)) as arrays:
                    hits += self.in_bytes(b"".join(arrays[n].tobytes() for n in arrays.files))
            if hits:
                found[name] = hits
        return found


def traces_of(gallery: Gallery, selection: Selection) -> tuple[Traces, list[dict[str, Any]]]:
    """(of what the selection means, the rows that are to stay)."""
    chosen = set(select_images(gallery, selection).uris.to_pylist())
    before = table_rows(gallery)
    gone = [row for row in before if row["uri"] in chosen]
    stay = [row for row in before if row["uri"] not in chosen]
    assert gone
    names = {r["identity"] for r in gone if r["identity"]} - {r["identity"] for r in stay}
    found = Traces(gone, names)
    others = Traces(stay, set())
    for kind in ("vectors", "thumbs"):  # fake models make the same ones for several images
        shared = getattr(found, kind) & getattr(others, kind)
        getattr(found, kind).difference_update(shared)
        found.needles -= shared | {base64.b64encode(data) for data in shared}
    return found, stay


def sound(gallery: Gallery, traces: Traces, stay: list[dict[str, Any]], paths: list[str], quick: bool = True) -> None:
    """Everything that holds after an erasure."""
    assert table_rows(gallery) == stay
    left = {n: d for n, d in tree(gallery.path).items() if not n.startswith("runs/")}
    assert traces.anywhere(left) == {}
    assert verify_gallery(Gallery(gallery.path)).problems == []
    assert not [n for n in os.listdir(Path(gallery.path, "erased")) if n.endswith((".pending", ".state", ".new"))]
    for path in paths:
        assert check_erased(Gallery(gallery.path), receipt.load_receipt(path)) == []
    if manifest.exists(gallery.path):
        assert verify_index(Gallery(gallery.path)) == []
        never_found(gallery, traces)
        if quick:
            up_to_date(gallery)


def never_found(gallery: Gallery, traces: Traces) -> None:
    searched = Index(gallery.path).search(np.array([np.frombuffer(v, "<f4") for v in traces.vectors]), k=50)
    assert not traces.ids & set(searched.ids.ravel().tolist())


def up_to_date(gallery: Gallery) -> None:
    store = manifest.open_index_store(gallery.path)
    now = find_changes(Gallery(gallery.path), manifest.load(gallery.path), store)
    assert not now.compared_all, "the next run reads everything"
    now.close()
    before = manifest.load(gallery.path)
    assert index.run(index.IndexConfig(), gallery.path).action == "unchanged"
    assert manifest.load(gallery.path).shards == before.shards
