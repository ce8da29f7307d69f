"""What is found out of a source before it is listed: its name in the gallery, and whether it was elsewhere before."""

from dataclasses import dataclass, replace

from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.sources import SOURCES_PROPERTY, GallerySource, SourceRegister, SourceRows, name_source
from facepipe.gallery.table import Gallery
from facepipe.moves.relocation import (
    Relocation,
    describe_relocation,
    find_older_spelling,
    find_relocation,
    make_relocated_source,
    relocate_rows,
)
from facepipe.sources import SourceConfig, SourcePlace, locate_source
from facepipe.sources.place import find_spelling
from facepipe.storage.lease import Lease


@dataclass(frozen=True)
class SettledSource:
    """A source as a gallery knows it.

    Attributes:
        config: The source, with the name and the spelling of its path that the gallery has.
        rows: Which rows are its own.
        register: The sources of the gallery, this one among them.
        relocation: Where the source was before, if it is found at another place for the first time.
        notes: Sentences for the user.
    """

    config: SourceConfig
    rows: SourceRows
    register: SourceRegister
    relocation: Relocation | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Value of the column `source`."""
        return self.rows.source.name

    def with_boxes(self, digest: str) -> "SettledSource":
        """Return the source with the digest of the lists that give its faces."""
        source = replace(self.rows.source, boxes=digest)
        return replace(self, rows=replace(self.rows, source=source), register=self.register.put(source))


def settle_source(gallery: Gallery | None, config: SourceConfig) -> SettledSource:
    """Find out what a gallery knows of a source; nothing is written.

    Args:
        gallery: the gallery; None if there is none yet.
        config: the source.

    Raises:
        ConfigError: the name of the source is that of another one, and their images could not be told apart.
    """
    register = SourceRegister.read(gallery)
    config, place, notes = _use_known_spelling(gallery, config, register)
    relocation = None
    # A source at a new place may be one that is gone from its old place.
    if gallery is not None and register.find(place) is None:
        relocation = find_relocation(gallery, register, place, config)
    if relocation is None:
        source = name_source(register, place, config.name, gallery)
    else:
        register = register.remove(relocation.source)
        source = name_source(register, place, config.name, gallery, freed=relocation.source.name)
        source = make_relocated_source(relocation, source)
    if config.name is None and source.name != place.name:
        notes.append(_describe_name(source, place))
    register = register.put(source)
    config = replace(config, name=source.name)
    return SettledSource(config, SourceRows(source, place), register, relocation, tuple(notes))


def register_source(gallery: Gallery, settled: SettledSource, run: str, lease: Lease | None) -> tuple[Gallery, int]:
    """Write down where a source is, and give its rows their new uris if it was elsewhere before.

    The register is written first. If the run ends in between, the next one tells the images by their content.

    Args:
        gallery: the gallery.
        settled: the source.
        run: id of the run.
        lease: lease of the gallery.

    Returns:
        The gallery in its newest version, and the number of images with new uris.
    """
    if SourceRegister.read(gallery) != settled.register:
        gallery.set_property(SOURCES_PROPERTY, settled.register.to_json())
        gallery = Gallery(gallery.path)
    if settled.relocation is None:
        return gallery, 0
    commit = Committer(gallery, f"{run}-relocate", lease)
    count = relocate_rows(gallery, settled.relocation, settled.rows.source, commit)
    return Gallery(gallery.path), count


def describe_settling(settled: SettledSource, relocated: int) -> tuple[str, ...]:
    """Describe for the user what is unusual about a source."""
    if settled.relocation is None:
        return settled.notes
    return (*settled.notes, describe_relocation(settled.relocation, settled.rows.place, relocated))


def _use_known_spelling(
    gallery: Gallery | None, config: SourceConfig, register: SourceRegister
) -> tuple[SourceConfig, SourcePlace, list[str]]:
    """Use the path by which the gallery knows a place, if a link leads to it by another one.

    Whoever gives the source a name of its own wants it beside the known one.
    """
    place = locate_source(config)
    if gallery is None or register.find(place) is not None:
        return config, place, []
    sources = [source for source in register.sources if config.name in (None, source.name)]
    known_root = find_spelling(place.root, (source.root for source in sources))
    if known_root is None and config.name is None:
        known_root = find_older_spelling(gallery, register, place)
    if known_root is None:
        return config, place, []
    uri = f"{known_root.rstrip('/')}/{place.glob}" if place.glob else known_root
    note = f"{place.root} is {known_root}, by which the gallery knows it"
    config = replace(config, uri=uri)
    return config, locate_source(config), [note]


def _describe_name(source: GallerySource, place: SourcePlace) -> str:
    return (
        f"this source is called {source.name!r} in the gallery, because {place.name!r} is another one; "
        "--set source.name=NAME chooses a name"
    )
