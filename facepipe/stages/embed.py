"""Embed: from chips to unit vectors, averaged with those of the mirrored chips, and the ids of the faces."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa

from facepipe.arrow import set_columns, to_float_lists, view_buffers
from facepipe.errors import ModelError
from facepipe.hashing import compute_face_id
from facepipe.models.protocols import Embedder, RunsOnDevice
from facepipe.models.runtime.device import NetworkPrecision, resolve_device, resolve_precision
from facepipe.models.zoo.registry import find_card
from facepipe.types import Bool, Float32, UInt8


@dataclass(frozen=True)
class Embed:
    """Embed chips with a registered embedder.

    Attributes:
        model: name of an embedder, or a model's TOML file
        flip: average the raw vectors of a chip and of its mirror image before normalisation
        batch: chips per call of the model
        device: cpu, cuda, or auto (what the plan of workers says, otherwise a GPU if there is one)
        precision: of the network on a GPU: float32, tf32, bfloat16, float16, or auto (what `run.precision` says,
            otherwise float32)
        threads: threads of a CPU
    """

    model: str = "dlib-resnet"
    flip: bool = True
    batch: int = 64
    device: str = "auto"
    precision: NetworkPrecision = "auto"
    threads: int = 1

    needs: ClassVar = ("uri", "image_id", "face_index", "chip")
    adds: ClassVar = ("embedding", "embedding_norm", "face_id")

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder, loaded at first use."""
        embedder: Embedder = find_card(self.model, "embedder").load(resolve_device(self.device), self.threads)
        if isinstance(embedder, RunsOnDevice):
            # A face and its mirror image.
            embedder.configure(resolve_precision(self.precision), 2 * self.batch if self.flip else self.batch)
        return embedder

    def setup(self) -> None:
        """Load the embedder, and try it on a first batch if it runs on a GPU, which may be faulty."""
        embedder = self.embedder
        if resolve_device(self.device) != "cpu":
            width, height = embedder.size
            self.measure_norms(self.embed_chips(np.full((2, height, width, 3), 128, np.uint8)))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the chips by embeddings."""
        width, height = self.embedder.size
        # Rows without a face have no chip; the others are flat buffers in the embedder's size.
        views = list(view_buffers(table["chip"]))
        is_face = np.array([view is not None for view in views], bool)
        chips = [np.frombuffer(view, np.uint8).reshape(height, width, 3) for view in views if view is not None]
        raw = self.embed_chips(np.stack(chips)) if chips else np.empty((0, self.embedder.dim), np.float32)
        return self._build_rows(table, is_face, raw)

    def _build_rows(self, table: pa.Table, is_face: Bool, raw: Float32) -> pa.Table:
        """Replace the column of chips by those of embeddings.

        Args:
            table: n rows.
            is_face: whether each row is a face, (n,).
            raw: raw vectors of the faces, in order, (faces, dim).

        Raises:
            ModelError: A vector has no direction.
        """
        norms = self.measure_norms(raw)
        unit = (raw / norms[:, None]).astype(np.float32)
        # Norms of all rows; nan, masked to null, for rows without a face.
        all_norms = np.full(len(is_face), np.nan, np.float32)
        all_norms[is_face] = norms
        rows = zip(*(table[name].to_pylist() for name in ("uri", "image_id", "face_index")), strict=True)
        ids = [None if index is None else compute_face_id(uri, image_id or "", index) for uri, image_id, index in rows]
        columns = {
            "embedding": to_float_lists(unit, is_face),
            "embedding_norm": pa.array(all_norms, pa.float32(), mask=~is_face),
            "face_id": pa.array(ids, pa.int64()),
        }
        return set_columns(table, columns, drop=("chip",))

    def measure_norms(self, raw: Float32) -> Float32:
        """Measure the norms of raw vectors. Raise ModelError for a zero or infinite one, which no row may hold."""
        norms = np.linalg.norm(raw, axis=1)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise ModelError(
                f"{self.model} gives vectors that are zero or not finite. Its input (mean, scale) may differ from what "
                "it was trained on: run `facepipe models check`"
            )
        return norms

    def embed_chips(self, chips: UInt8) -> Float32:
        """Embed chips in batches.

        Args:
            chips: RGB, (n, h, w, 3), n >= 1.

        Returns:
            Raw vectors, (n, dim), not normalised.
        """
        batches = [chips[start : start + self.batch] for start in range(0, len(chips), self.batch)]
        return np.concatenate([self._embed_batch(batch) for batch in batches])

    def _embed_batch(self, chips: UInt8) -> Float32:
        if not self.flip:
            return self.embedder.embed(chips)
        # Embed the chips and their mirror images in one call, then average the two halves.
        vectors = self.embedder.embed(np.concatenate([chips, chips[:, :, ::-1]]))
        return np.asarray((vectors[: len(chips)] + vectors[len(chips) :]) / 2, np.float32)
