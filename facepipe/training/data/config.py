"""The settings of the training data: a gallery or a source, its labels, and what must not be in it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from facepipe.errors import ConfigError
from facepipe.sources import SourceConfig
from facepipe.sources.identity import IdentityRule

# `exclude_share` decided alone until there was `exclude_probability`.
_EARLIER_EXCLUDE_SHARE = 0.3


@dataclass(frozen=True)
class DataConfig:
    """Configure the training data: a gallery, or a source that was never embedded. Set one of the two.

    Attributes:
        gallery: gallery whose images to train on, with its boxes and landmarks; no detector runs.
        list: list that restricts and labels a gallery, as `facepipe clean` writes it: clean.csv (faces and names),
            clean.txt or msceleb.txt (images and numbers).
        source: anything that `facepipe embed` reads: a folder of folders, a list (CASIA-WebFace, identity_CelebA.txt,
            MS-Celeb-1M), LFW, tar shards, Parquet.
        identity: where a source's labels come from, as in `[source]`: auto, folder, filename, label.
        root: folder that a list's paths are relative to.
        aligned: the source's images are face crops already: scale them to the chip and run no detector.
        detector: detector for a source. If an image has several faces, the large and central one is used, as LFW is
            aligned.
        min_images: minimum number of images per identity; identities with fewer are left out.
        max_images: maximum number of images per identity; the choice is always the same.
        exclude: galleries to test on, which are left out of the training data: images by their bytes, and identities
            by their names (if these contain a letter). From a gallery, near copies of images and persons with other
            names are left out too, as `facepipe dedup --against` finds them. That needs galleries made with one
            embedder.
        exclude_probability: probability from which a person of an excluded gallery is left out under another name.
        exclude_share: share of the pairs of faces of two identities that must be near as well, for a person to be left
            out under another name.
        exclude_identities: names to leave out, or a file with one per line.
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
    exclude_probability: Annotated[float, Field(gt=0, le=1)] = 0.6
    exclude_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    exclude_identities: tuple[str, ...] | str = ()

    def check(self) -> "DataConfig":
        """Return the config if its settings agree with each other.

        Raises:
            ConfigError: Settings contradict each other.
        """
        # Exactly one origin, and no setting that the origin ignores.
        if bool(self.gallery) == bool(self.source):
            count = "both are set" if self.gallery else "none is set"
            raise ConfigError(f"data.gallery and data.source: {count}; set exactly one of them")
        if self.list and not self.gallery:
            raise ConfigError("data.list restricts a gallery: to train on the list's own images, set data.source to it")
        if self.aligned and self.gallery:
            raise ConfigError("data.aligned needs a source of face crops: remove it, a gallery has boxes already")
        if self.source and self.identity == "none":
            raise ConfigError("data.identity=none leaves no labels to train on: set auto, folder, filename or label")
        if self.max_images is not None and self.max_images < self.min_images:
            raise ConfigError(f"data.max_images={self.max_images} is less than data.min_images={self.min_images}")
        return self

    def list_forms(self) -> tuple[dict[str, Any], ...]:
        """List the settings as a dict, in the forms that this and earlier versions hash. Today's is the first."""
        form = asdict(self)
        if self.exclude_probability != DataConfig.exclude_probability:
            return (form,)
        earlier = {name: value for name, value in form.items() if name != "exclude_probability"}
        if self.exclude_share == DataConfig.exclude_share:
            earlier["exclude_share"] = _EARLIER_EXCLUDE_SHARE
        return form, earlier

    @property
    def source_config(self) -> SourceConfig:
        """The source, for `open_source`."""
        return SourceConfig(self.source, identity=self.identity, root=self.root)
