"""What counts as a duplicate, and which copy stays."""

from dataclasses import dataclass
from typing import Literal

from facepipe.errors import ConfigError

EXACT, NEAR, SAME_SHOT = "exact", "near", "same_shot"
KINDS = (EXACT, NEAR, SAME_SHOT)  # the surest first
Kind = Literal["exact", "near", "same_shot"]
Keep = Literal["largest", "sharpest", "oldest"]


@dataclass(frozen=True)
class DuplicateRule:
    """Limits on image hashes (bits of 64) and on face distances (Euclidean, unit vectors), and the copy to keep.

    exact: the same bytes.
    near: hash AND face must agree, and the less one of them does, the more the other must:
      hash_bits, near: hashes within 16 bits and faces within 0.12 (cropped or recoloured copies move the hash only)
      close_bits, close_near: hashes within 4 bits and faces within 0.25 (small or compressed ones move the face only)
    same_shot: the hashes disagree, but faces within 0.15, one identity or none, and most faces of the images in pairs.
    keep: `largest` (most pixels, then most bytes, oldest, first uri), `sharpest` or `oldest` (then largest ...).
      Sharpness is that of the image's largest face, age the time of its ingestion. Between copies of one size sharpness
      misleads: the blocks of strong compression are edges too, and kept q30 copies for half of 329 originals.
    drop: the weakest kind that makes groups, of which one image is kept; pairs of weaker kinds are only listed.

    The limits are for dlib-resnet with flip, from 3,811 LFW images and 7 copies of 329 images among them
    (tests/bench/duplicates.py). Copies cropped by 5 %: faces within 0.12, 98 of 100 within 14 bits; recoloured: 0.12
    and 9; recompressed q30: 0.18 and 2; shrunk to 0.6: 0.20 and 2; to 0.4 (faces of 37 px): 2, and 0.25 for 97 of 100.
    Different photos: none within 16 bits and 0.12, nor within 4 bits and 0.4; strangers' main faces 0.24 and more. Of
    one person: 10 pairs within 0.15, all of one occasion by eye; 128 within 0.2, hardly more than half of them.
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
            raise ConfigError(f"no kind of duplicates {self.drop!r}; kinds are {', '.join(KINDS)}")
        if self.keep not in ("largest", "sharpest", "oldest"):
            raise ConfigError(f"keep is largest, sharpest or oldest, not {self.keep!r}")

    @property
    def radius(self) -> float:
        """The largest face distance that matters: edges beyond it need not be looked for."""
        return max(self.near, self.close_near, self.same_shot)
