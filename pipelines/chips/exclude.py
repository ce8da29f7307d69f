"""What a chip set must not hold: images, copies of images, and persons of the galleries that will test the network."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.gallery import Gallery
from facepipe.models.zoo.registry import find_match_threshold
from facepipe.storage import join
from facepipe.training.data.chip_writer import normalise_name
from facepipe.training.data.config import DataConfig
from facepipe.training.data.selection import Exclusions
from facepipe.training.data.split import read_names
from pipelines import dedup
from pipelines.graph import GraphConfig

Progress = Callable[[str], None]
_FEW = 2000


def collect_exclusions(data: DataConfig, progress: Progress = lambda line: None) -> Exclusions:
    """Of the galleries in data.exclude, and of the names in data.exclude_identities.

    Of a gallery to train on also the report of `dedup --against` is made, and read. Raises ContractError where the
    two galleries were made with other models.
    """
    names = {normalise_name(name) for name in read_excluded_names(data)}
    images, copies = [pa.array([], pa.string())], [pa.array([], pa.string())]
    for path in data.exclude:
        held, theirs = _read_contents(Gallery(path))
        images.append(held)
        names |= {normalise_name(name) for name in theirs if any(c.isalpha() for c in name)}
        if data.gallery:
            progress(f"comparing with {path}")
            uris, persons = _find_overlap(data, path, progress)
            copies.append(uris)
            names |= {normalise_name(name) for name in persons}
    return Exclusions(pc.unique(pa.concat_arrays(images)), pc.unique(pa.concat_arrays(copies)), frozenset(names))


def read_excluded_names(data: DataConfig) -> list[str]:
    """The names of data.exclude_identities, read from the file where it is one."""
    given = data.exclude_identities
    return read_names(given) if isinstance(given, str) and given else list(given)


def _read_contents(gallery: Gallery) -> tuple[pa.Array, list[str]]:
    """(content hashes, identities) of a gallery."""
    images, names = [pa.array([], pa.string())], set[str]()
    for batch in gallery.batches(["image_id", "identity"], rows=65536):
        images.append(pc.unique(batch["image_id"].drop_null()))
        names.update(pc.unique(batch["identity"].drop_null()).to_pylist())
    return pc.unique(pa.concat_arrays(images)), sorted(names)


def _choose_threshold(*galleries: str) -> float | None:
    """The model's own where there are too few faces to find one in; then a share of pairs still tells persons apart."""
    opened = [Gallery(path) for path in galleries]
    faces = sum(row["faces"] for gallery in opened for row in gallery.files())
    return find_match_threshold(opened[0].contract.embedder) if faces < _FEW else None


def _find_overlap(data: DataConfig, against: str, progress: Progress) -> tuple[pa.Array, list[str]]:
    """(uris of images that the other gallery holds as well, identities of persons whom it does)."""
    rules = dedup.DedupConfig(graph=GraphConfig(threshold=_choose_threshold(data.gallery, against)))
    summary = dedup.run(rules, data.gallery, against, progress)
    if summary.without_threshold:
        progress(
            f"from which distance two faces are of one person is not known: persons of {against} under other names may "
            "stay in the training data. Say same_person in the embedder's TOML file"
        )
    out = summary.out
    decisions = pq.read_table(join(out, "decisions.parquet"), columns=["uri", "side", "decision"])
    copies = decisions.filter(pc.and_(pc.equal(decisions["side"], 0), pc.equal(decisions["decision"], "drop")))
    persons: Any = pq.read_table(join(out, "identities.parquet"))
    near = persons.filter(pc.greater_equal(persons["share"], data.exclude_share))
    return copies["uri"].combine_chunks(), near["identity_0"].unique().to_pylist()
