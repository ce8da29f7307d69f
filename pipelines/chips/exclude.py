"""Find what a chip set must not hold: images, copies of images, and persons of the galleries that test the network."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.gallery import Gallery
from facepipe.models.zoo.registry import find_match_threshold
from facepipe.sources.labels import normalise_name
from facepipe.storage import join
from facepipe.training.data.config import DataConfig
from facepipe.training.data.selection import Exclusions
from facepipe.training.data.split import read_names
from pipelines import dedup
from pipelines.graph import GraphConfig

# Faces of both galleries together below which no threshold can be estimated from the data.
_MIN_CALIBRATION_FACES = 2000
_BATCH_ROWS = 65536


def collect_exclusions(data: DataConfig, log: Callable[[str], None] = lambda line: None) -> Exclusions:
    """Collect the exclusions of `data.exclude` and `data.exclude_identities`.

    To train on a gallery, this also runs `dedup --against` for each excluded gallery and reads its report.

    Args:
        data: what to train on.
        log: called with lines about the progress.

    Raises:
        ContractError: A gallery to exclude was made with other models than the gallery to train on.
    """
    names = {normalise_name(name) for name in read_excluded_names(data)}
    # Start with empty arrays, so that the concatenation below also works if no gallery is excluded.
    images = [pa.array([], pa.string())]
    copies = [pa.array([], pa.string())]
    for path in data.exclude:
        gallery_images, gallery_names = _read_contents(Gallery(path))
        images.append(gallery_images)
        # A name without a letter is likely a number, which says nothing about the person.
        names |= {normalise_name(name) for name in gallery_names if any(c.isalpha() for c in name)}
        # Persons and copies under other names can only be found between two galleries.
        if data.gallery:
            log(f"comparing with {path}")
            uris, persons = _find_overlap(data, path, log)
            copies.append(uris)
            names |= {normalise_name(name) for name in persons}
    return Exclusions(
        images=pc.unique(pa.concat_arrays(images)), uris=pc.unique(pa.concat_arrays(copies)), names=frozenset(names)
    )


def read_excluded_names(data: DataConfig) -> list[str]:
    """Read the names of `data.exclude_identities`, from its file if it names one."""
    names = data.exclude_identities
    return read_names(names) if isinstance(names, str) and names else list(names)


def _read_contents(gallery: Gallery) -> tuple[pa.Array, list[str]]:
    """Read the content hashes and the identities of a gallery."""
    images = [pa.array([], pa.string())]
    names: set[str] = set()
    for batch in gallery.batches(["image_id", "identity"], rows=_BATCH_ROWS):
        images.append(pc.unique(batch["image_id"].drop_null()))
        names.update(pc.unique(batch["identity"].drop_null()).to_pylist())
    return pc.unique(pa.concat_arrays(images)), sorted(names)


def _choose_threshold(*paths: str) -> float | None:
    """Return the model's own threshold if the galleries have too few faces to calibrate one, else None.

    The share of near pairs then still separates persons.
    """
    galleries = [Gallery(path) for path in paths]
    faces = sum(gallery.count_totals().faces for gallery in galleries)
    if faces >= _MIN_CALIBRATION_FACES:
        return None
    return find_match_threshold(galleries[0].contract.embedder)


def _find_overlap(data: DataConfig, against: str, log: Callable[[str], None]) -> tuple[pa.Array, list[str]]:
    """Find what the gallery to train on shares with another one.

    Returns:
        The uris of images that the other gallery holds as well; and the identities of persons in it.
    """
    rules = dedup.DedupConfig(graph=GraphConfig(threshold=_choose_threshold(data.gallery, against)))
    summary = dedup.run(rules, data.gallery, against, log)
    if summary.without_threshold:
        log(
            f"no distance is known up to which two faces show one person: persons of {against} with other names may "
            "stay in the training data. Set same_person in the embedder's TOML file"
        )
    decisions = pq.read_table(join(summary.out, "decisions.parquet"), columns=["uri", "side", "decision"])
    # Side 0 is the gallery to train on. Its images to drop are those that the other gallery holds as well.
    is_copy = pc.and_(pc.equal(decisions["side"], 0), pc.equal(decisions["decision"], "drop"))
    copies = decisions.filter(is_copy)
    # A person is excluded if it is likely enough that the other gallery has it too.
    pairs: Any = pa.concat_tables(
        [pq.read_table(join(summary.out, name)) for name in ("identities.parquet", "look_alikes.parquet")]
    )
    is_person = pc.greater_equal(pairs["probability"], data.exclude_probability)
    persons = pairs.filter(pc.and_(is_person, pc.greater_equal(pairs["share"], data.exclude_share)))
    return copies["uri"].combine_chunks(), persons["identity_0"].unique().to_pylist()
