"""Embed: chips to unit vectors, with the mirrored chip averaged in, and the ids of the faces."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa

from facepipe.arrow import set_columns, to_float_lists, view_buffers
from facepipe.errors import ModelError
from facepipe.hashing import compute_face_id
from facepipe.models.protocols import Embedder
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.registry import find_card
from facepipe.types import Bool, Float32, UInt8


@dataclass(frozen=True)
class Embed:
    """Embeds chips with a registered embedder.

    flip: the raw vectors of a chip and of its mirror image are averaged before normalisation
    batch: chips given to the model at a time
    device: cpu, cuda, or auto (what the plan gives, else a GPU if there is one); threads: on a CPU
    """

    model: str = "dlib-resnet"
    flip: bool = True
    batch: int = 64
    device: str = "auto"
    threads: int = 1

    needs: ClassVar = ("uri", "image_id", "face_index", "chip")
    adds: ClassVar = ("embedding", "embedding_norm", "face_id")

    @cached_property
    def embedder(self) -> Embedder:
        loaded: Embedder = find_card(self.model, "embedder").load(resolve_device(self.device), self.threads)
        return loaded

    def setup(self) -> None:
        _ = self.embedder

    def __call__(self, table: pa.Table) -> pa.Table:
        width, height = self.embedder.size
        views = list(view_buffers(table["chip"]))
        valid = np.array([view is not None for view in views], bool)
        chips = [np.frombuffer(view, np.uint8).reshape(height, width, 3) for view in views if view is not None]
        raw = self.embed_chips(np.stack(chips)) if chips else np.empty((0, self.embedder.dim), np.float32)
        return self.build_rows(table, valid, raw)

    def build_rows(self, table: pa.Table, valid: Bool, raw: Float32) -> pa.Table:
        """The table with the raw vectors (n, dim) of its faces, which are its `valid` rows, normalised; less its chips.

        Raises ModelError for a vector without a direction.
        """
        norm = self._norm(raw)
        unit = raw / norm[:, None]
        names = zip(*(table[name].to_pylist() for name in ("uri", "image_id", "face_index")), strict=True)
        ids = [None if index is None else compute_face_id(uri, image or "", index) for uri, image, index in names]
        norms = np.full(len(valid), np.nan, np.float32)
        norms[valid] = norm
        columns = {
            "embedding": to_float_lists(unit.astype(np.float32), valid),
            "embedding_norm": pa.array(norms, pa.float32(), mask=~valid),
            "face_id": pa.array(ids, pa.int64()),
        }
        return set_columns(table, columns, drop=("chip",))

    def _norm(self, raw: Float32) -> Float32:
        """(n, dim) -> (n,). Raises ModelError for a vector without a direction, which no row may hold."""
        norm = np.linalg.norm(raw, axis=1)
        if not (np.isfinite(norm) & (norm > 0)).all():
            raise ModelError(
                f"{self.model} gives vectors that are not finite, or zero: is its input (mean, scale) what it was "
                "trained on? `facepipe models check` tells"
            )
        return norm

    def embed_chips(self, chips: UInt8) -> Float32:
        """(n, h, w, 3) RGB -> (n, dim), not normalised."""
        return np.concatenate([self._batch(chips[at : at + self.batch]) for at in range(0, len(chips), self.batch)])

    def _batch(self, chips: UInt8) -> Float32:
        if not self.flip:
            return self.embedder.embed(chips)
        both = self.embedder.embed(np.concatenate([chips, chips[:, :, ::-1]]))
        return np.asarray((both[: len(chips)] + both[len(chips) :]) / 2, np.float32)
