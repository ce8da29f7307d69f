"""The rule for what counts as a duplicate, and which copy is kept."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from facepipe.errors import ConfigError

EXACT = "exact"
NEAR = "near"
SAME_SHOT = "same_shot"
KINDS = (EXACT, NEAR, SAME_SHOT)  # the surest first
Kind = Literal["exact", "near", "same_shot"]
Keep = Literal["largest", "sharpest", "oldest"]


@dataclass(frozen=True)
class DuplicateRule:
    """Limits on image hashes (bits of 64) and on face distances (Euclidean, unit vectors), and the copy to keep.

    An image is an exact copy if its bytes are the same. A near copy agrees in hash AND face: the less one of them
    agrees, the more the other must. Same shot means that the hashes disagree, but that the faces are near, the identity
    is the same or missing, and most faces of the two images form pairs.

    The limits are for dlib-resnet with flip, from 3,811 LFW images and 7 copies of 329 images among them
    (tests/bench/duplicates.py). Copies cropped by 5 %: faces within 0.12, and 98 of 100 within 14 bits. Recoloured:
    0.12 and 9 bits. Recompressed at q30: 0.18 and 2 bits. Shrunk to 0.6: 0.20 and 2 bits. Shrunk to 0.4 (faces of 37
    px): 2 bits, and 0.25 for 97 of 100. Different photos: none within 16 bits and 0.12, nor within 4 bits and 0.4.
    The main faces of strangers: 0.24 and more. Of one person: 10 pairs within 0.15, all of one occasion by eye, and
    128 within 0.2, hardly more than half of them of one occasion.

    Attributes:
        hash_bits: Differing bits up to which cropped or recoloured copies are near; these move the hash only.
        near: Face distance up to which they are near, together with `hash_bits`.
        close_bits: Differing bits up to which small or compressed copies are near; these move the face only.
        close_near: Face distance up to which they are near, together with `close_bits`.
        same_shot: Face distance up to which two photos are of the same shot.
        keep: Copy to keep: `largest` (most pixels, then most bytes, oldest, first uri), `sharpest` or `oldest` (then
            largest). Sharpness is that of the image's largest face, and age is the time of its ingestion. Between
            copies of one size sharpness misleads: the blocks of strong compression are edges too. It kept q30 copies
            for half of 329 originals.
        drop: Weakest kind that makes groups, of which one image is kept. Pairs of weaker kinds are only listed.
    """

    hash_bits: int = 16
    near: float = 0.12
    close_bits: int = 4
    close_near: float = 0.25
    same_shot: float = 0.15
    keep: Keep = "largest"
    drop: Kind = "near"

    def __post_init__(self) -> None:
        if self.drop not in KINDS:
            raise ConfigError(f"drop={self.drop!r} is not a kind of duplicate: use {', '.join(KINDS)}")
        if self.keep not in get_args(Keep):
            raise ConfigError(f"keep={self.keep!r} is not a choice: use {', '.join(get_args(Keep))}")

    def fit_model(self, limits: dict[str, float]) -> "DuplicateRule":
        """Take the limits that were measured for a model, for those that are at their defaults.

        Args:
            limits: distances by the names of the fields, as `facepipe models measure` finds them.
        """
        default = DuplicateRule()

        def choose(name: str) -> float:
            value: float = getattr(self, name)
            return limits.get(name, value) if value == getattr(default, name) else value

        return replace(self, near=choose("near"), close_near=choose("close_near"), same_shot=choose("same_shot"))

    @property
    def radius(self) -> float:
        """Largest face distance that matters: edges beyond it need not be looked for."""
        return max(self.near, self.close_near, self.same_shot)
