"""What a network is trained on: a gallery or a source, whose identities, and what must not be among them."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from facepipe.errors import ConfigError
from facepipe.sources import SourceConfig
from facepipe.sources.identity import IdentityRule


@dataclass(frozen=True)
class DataConfig:
    """The training data: a gallery, or a source that was never embedded. Give one of the two.

    gallery: its images, with the boxes and landmarks that it holds: no detector is run
    list: of a gallery: a list as `facepipe clean` writes it, clean.csv (faces and names), clean.txt or msceleb.txt
        (images and numbers); only what it names is taken, with its labels
    source: anything that `facepipe embed` reads: a folder of folders, a list (CASIA-WebFace, identity_CelebA.txt,
        MS-Celeb-1M), LFW, tar shards, Parquet
    identity: of a source: where its labels come from, as in `[source]`: auto, folder, filename, label
    root: of a source: the folder that a list's paths are relative to; of a gallery: that of a list's paths
    aligned: of a source: its pictures are face crops already: scaled to the chip, no detector is run
    detector: of a source: which finds the faces. Of a picture with several the one is taken that is large and central,
        as LFW is aligned
    min_images, max_images: of an identity; one with fewer is left out, of one with more some are, always the same
    exclude: galleries to test on: what they hold is left out. Images by their bytes and identities by their names
        (those with a letter in them); of a gallery also near copies of pictures and identities with other names whose
        faces are near, as `facepipe dedup --against` finds them, which needs galleries made with one embedder
    exclude_share: of all pairs of faces of two identities, the share that is near where they are taken for one person
    exclude_identities: names to leave out, or a file with one a line
    """

    gallery: str = ""
    list: str = ""
    source: str = ""
    identity: IdentityRule = "auto"
    root: str | None = None
    aligned: bool = False
    detector: str = "retinaface-mnet025"
    min_images: Annotated[int, Field(ge=1)] = 1
    max_images: Annotated[int, Field(ge=1)] | None = None
    exclude: tuple[str, ...] = ()
    exclude_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    exclude_identities: tuple[str, ...] | str = ()

    def check(self) -> "DataConfig":
        """Itself. Raises ConfigError for settings that contradict each other."""
        if bool(self.gallery) == bool(self.source):
            given = "both" if self.gallery else "neither"
            raise ConfigError(f"data.gallery and data.source: {given} given; training takes exactly one of them")
        if self.list and not self.gallery:
            raise ConfigError("data.list restricts a gallery; to train on the list's own images set data.source to it")
        if self.aligned and self.gallery:
            raise ConfigError("data.aligned is for a source of face crops; a gallery knows where its faces are")
        if self.source and self.identity == "none":
            raise ConfigError("data.identity = none leaves no labels to train on: take auto, folder, filename or label")
        if self.max_images is not None and self.max_images < self.min_images:
            raise ConfigError(f"data.max_images {self.max_images} is less than data.min_images {self.min_images}")
        return self

    @property
    def source_config(self) -> SourceConfig:
        """The source, for `open_source`."""
        return SourceConfig(self.source, identity=self.identity, root=self.root)
