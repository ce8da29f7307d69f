"""Write WebDataset's tar shards, and a dataset of Hugging Face: Parquet shards and a card."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.datasets.content import ImageContent, describe_image

_SHARD_BYTES = 1 << 30
_SHARD_IMAGES = 10_000
_ROWS_PER_GROUP = 256


def write_webdataset(images: Iterable[ImageContent], folder: str) -> None:
    """Write tar shards. An image has a `.cls` with its person's number, and a `.json` with its label and uri."""
    key = 0
    for number, shard in enumerate(_cut_shards(images)):
        with tarfile.open(os.path.join(folder, f"{number:05d}.tar"), "w", format=tarfile.PAX_FORMAT) as archive:
            for image in shard:
                details = json.dumps({"identity": image.name, "uri": image.uri, "image_id": image.image_id})
                stem = f"{key:09d}"
                _add_member(archive, f"{stem}.{describe_image(image.data).extension}", image.data)
                _add_member(archive, f"{stem}.cls", str(image.person).encode())
                _add_member(archive, f"{stem}.json", details.encode())
                key += 1


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_hugging_face(images: Iterable[ImageContent], folder: str) -> None:
    """Write Parquet shards with the columns `image` and `label`, the labels' names in the schema, and a card."""
    data = os.path.join(folder, "data")
    os.mkdir(data)
    paths = []
    names: list[str] = []
    count = 0
    for number, shard in enumerate(_cut_shards(images)):
        path = os.path.join(data, f"{number}.unfinished")
        schema = _make_schema([])
        with pq.ParquetWriter(path, schema, compression="none") as writer:
            for group in _cut_groups(shard, _ROWS_PER_GROUP):
                for image in group:
                    if image.person == len(names):
                        names.append(image.name)
                count += len(group)
                stored = [{"bytes": image.data, "path": _get_file_name(image)} for image in group]
                columns = {"image": stored, "label": [image.person for image in group]}
                writer.write_table(pa.table(columns, schema=schema))
        paths.append(path)
    for number, path in enumerate(paths):
        final = os.path.join(data, f"train-{number:05d}-of-{len(paths):05d}.parquet")
        _write_names(path, final, names)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(_make_card(count, len(names)))


def _get_file_name(image: ImageContent) -> str:
    return image.uri.replace("#", "/").rpartition("/")[2]


def _make_schema(names: list[str]) -> pa.Schema:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    return pa.schema(fields, metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def _write_names(path: str, final: str, names: list[str]) -> None:
    """Write a shard again with the names of all labels, which are known at the end only."""
    schema = _make_schema(names)
    with pq.ParquetFile(path) as file, pq.ParquetWriter(final, schema, compression="none") as writer:
        for group in range(file.num_row_groups):
            writer.write_table(file.read_row_group(group).replace_schema_metadata(schema.metadata))
    os.unlink(path)


def _make_card(images: int, persons: int) -> str:
    return f"""---
task_categories:
- image-classification
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---

# Faces

{images:,} images of {persons:,} persons. Columns: `image`, and `label`, the number of the person.

Before you share this: whose faces are these, who allowed their use, and under which licence?
"""


def _cut_shards(images: Iterable[ImageContent]) -> Iterator[Iterator[ImageContent]]:
    """Cut images into shards of a size. Each shard is read to its end before the next one is asked for."""
    waiting = iter(images)
    first = next(waiting, None)
    while first is not None:
        rest: list[ImageContent | None] = [None]
        yield _fill_shard(first, waiting, rest)
        first = rest[0]


def _fill_shard(
    first: ImageContent, images: Iterator[ImageContent], rest: list[ImageContent | None]
) -> Iterator[ImageContent]:
    size = 0
    count = 0
    image: ImageContent | None = first
    while image is not None:
        size += len(image.data)
        count += 1
        yield image
        image = next(images, None)
        if image is not None and (count == _SHARD_IMAGES or size + len(image.data) > _SHARD_BYTES):
            rest[0] = image
            return


def _cut_groups(images: Iterator[ImageContent], size: int) -> Iterator[list[ImageContent]]:
    group: list[ImageContent] = []
    for image in images:
        group.append(image)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
