"""The settings of `embed`: one section per stage, one for the source, one for missing images, one for the run."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

import facepipe
from facepipe import storage
from facepipe.gallery import Contract
from facepipe.gallery.failures import RetryRule, check_statuses, describe_crash
from facepipe.imaging.decode import describe_decoders
from facepipe.models.zoo.devices import can_use_gpu
from facepipe.models.zoo.registry import GIVEN
from facepipe.schema import CRASHED, DECODE_ERROR, NO_FACE, READ_ERROR, TOO_LARGE
from facepipe.sources import SourceConfig
from facepipe.sources.blocks import BlockSize
from facepipe.stages import Align, Decode, Detect, Embed, Read
from pipelines.runtime.plan import GpuModels, Layout, WorkerGroup, WorkerPlan

Count = Annotated[int, Field(ge=1)]

Runner = Literal["auto", "inline", "local", "ray"]
Precision = Literal["float32", "tf32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RunConfig:
    """Configure how the work is run. Only `precision` changes the results.

    Attributes:
        runner: local (processes on this machine), ray, inline (this process), or auto: local, but ray for more than
            auto_images images if RAY_ADDRESS names a cluster or layout is split
        auto_images: number of images above which auto uses a cluster
        workers: number of workers; default: one per CPU, or one per GPU if there are GPUs
        min_workers: workers that Ray keeps while there is less work
        max_workers: workers to which Ray grows if more nodes come; default: `workers`, or as many as there is room for
        gpus_per_worker: GPUs per worker that runs models; 0.5: two workers share a GPU. Default: 1, or less if one
            of the models runs on CPUs
        layout: fused (each worker runs all stages), split (some workers decode, others run the models; needs Ray), or
            auto: split if there are GPUs and most CPUs are on machines without one
        batch: maximum number of images per batch; default: 16, with a GPU 256
        batch_bytes: maximum number of bytes of decoded images per batch; default: 64 MiB, with a GPU 256 MiB. A worker
            holds up to three batches, with a GPU seven
        resident: has no effect any more: a GPU runs the same stages as a CPU
        precision: precision of the networks on a GPU. float32 is IEEE. tf32 and float16 move vectors by a median of
            about 0.002, bfloat16 by 0.01; two people are 0.4 apart
        block_smallest: minimum number of images per unit of work, which is one Parquet file
        block_largest: maximum number of images per unit of work; default: 512, with GPUs 4096, because their pipeline
            runs empty at the end of each
        commit_seconds: seconds between commits of finished work, but at least twenty times the duration of a commit
    """

    runner: Runner = "auto"
    auto_images: Count = 500
    workers: Count | None = None
    min_workers: Count = 1
    max_workers: Count | None = None
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] | None = None
    layout: Layout = "auto"
    batch: Count | None = None
    batch_bytes: Count | None = None
    resident: bool = True
    precision: Precision = "float32"
    block_smallest: Count = 16
    block_largest: Count | None = None
    commit_seconds: float = 10.0

    def choose_block_size(self, plan: WorkerPlan) -> BlockSize:
        """Choose how the work is cut for a plan."""
        return BlockSize(self.block_smallest, self.block_largest or plan.largest_block, plan.workers)

    def limit_workers(self, plan: WorkerPlan) -> WorkerPlan:
        """Set how far the groups of a plan shrink and grow on Ray."""
        return plan.limit_workers(self.min_workers, self.max_workers or self.workers)


@dataclass(frozen=True)
class MissingConfig:
    """Configure what happens to images that the gallery holds but the source no longer lists.

    Attributes:
        policy: keep (do nothing) or mark (set `missing_since` of their rows; a later listing clears it)
        at_most: maximum share of the source's images to mark. If more are missing, none is marked, because the source
            itself is likely at fault (not mounted, another folder of the same name)
    """

    policy: Literal["keep", "mark"] = "keep"
    at_most: Annotated[float, Field(ge=0, le=1)] = 0.1


@dataclass(frozen=True)
class RetryConfig:
    """Configure which failed images are tried again.

    An image that failed, or showed no face, is tried again if the decoder, the limit or the setting that failed it has
    changed. One that could not be read always is.

    Attributes:
        statuses: statuses of which all images are tried again: decode_error, too_large, no_face, crashed
    """

    statuses: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelsConfig:
    """Configure which models may be used.

    Attributes:
        policy: any, or commercial: refuse models whose weights or code forbid commercial use, or that are known to be
            trained on data for research only. What a model of your own was trained on is not known here
    """

    policy: Literal["any", "commercial"] = "any"


@dataclass(frozen=True)
class EmbedConfig:
    """Configure `embed`.

    Attributes:
        source: where images come from
        read: reading of files
        decode: decoding of images
        detect: detection of faces
        align: cutting of chips
        embed: embedding of chips
        missing: images that the source no longer lists
        retry: images that failed before
        models: which models may be used
        run: how the work is run
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)
    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    missing: MissingConfig = field(default_factory=MissingConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def contract(self) -> Contract:
        """What the embeddings depend on."""
        return Contract.from_models(self.detector_name, self.embed.model, self.embed.flip)

    @property
    def detector_name(self) -> str:
        """What finds the faces: the detector, or lists and the detector for what they leave out."""
        model = self.detect.model
        return GIVEN + model if self.source.lists_of_faces and not model.startswith(GIVEN) else model

    @property
    def warning(self) -> str:
        """A warning about a valid but probably unintended setting, or an empty string."""
        if self.embed.model != "face-recognition" or not self.embed.flip:
            return ""
        return (
            "embed.flip averages the mirror image in, which the library face_recognition does not do. For its own "
            "vectors use --config face_recognition.toml, or --set embed.flip=false"
        )

    def describe_attempt(self) -> dict[str, str]:
        """Describe in short form what images are tried with, by the status of those that fail."""
        programs = f"facepipe {facepipe.__version__}, {describe_decoders()}"
        detect = self.detect
        detection: dict[str, object] = {
            "size": detect.size,
            "quick_look": detect.quick_look,
            "border_below": detect.border_below,
            "second_look": detect.second_look,
            "min_score": detect.min_score,
            "max_iou": detect.max_iou,
            "min_face": detect.min_face,
            "turns": detect.turns,
            "small_faces": detect.small_faces,
            "working_side": self.decode.working_side,
        }
        if self.source.lists_of_faces:
            # Another list may give a face to an image that had none.
            detection["boxes"] = "+".join(storage.get_entry(path).fingerprint for path in self.source.lists_of_faces)
        limits = {
            "max_bytes": self.read.max_bytes,
            "max_pixels": self.decode.max_pixels,
            "max_whole_pixels": self.decode.max_whole_pixels,
            "max_scans": self.decode.max_scans,
        }
        return {
            DECODE_ERROR: programs,
            TOO_LARGE: _format_settings(limits),
            NO_FACE: f"{self.contract.detector} {_format_settings(detection)}",
            CRASHED: describe_crash(programs, socket.gethostname()),
        }

    def make_retry_rule(self) -> RetryRule:
        """Make the rule for images that failed before. Raises ConfigError for an unknown status."""
        statuses = frozenset((READ_ERROR, *self.retry.statuses))
        check_statuses(statuses)
        return RetryRule(self.describe_attempt(), statuses)

    def build_stages(self, group: WorkerGroup) -> tuple[Any, ...]:
        """Build the stages of a group, set to the group's device and threads."""
        # Fill in what depends on the group: devices, threads, and the chips that the embedder takes.
        detect_device = _choose_device(self.detect.device, self.detect.model, group)
        embed_device = _choose_device(self.embed.device, self.embed.model, group)
        read = self.read
        decode = self.decode.raise_working_side(self.detect.size)
        decode = replace(decode, threads=max(decode.threads, group.threads))
        detect_precision = self.run.precision if self.detect.precision == "auto" else self.detect.precision
        embed_precision = self.run.precision if self.embed.precision == "auto" else self.embed.precision
        detect = replace(self.detect, device=detect_device, threads=group.threads, precision=detect_precision)
        align = replace(self.align, embedder=self.embed.model, detector=self.detector_name)
        embed = replace(self.embed, device=embed_device, threads=group.threads, precision=embed_precision)
        stages: dict[str, Any] = {"read": read, "decode": decode, "detect": detect, "align": align, "embed": embed}
        return tuple(stages[name] for name in group.stages)

    @property
    def gpu_models(self) -> GpuModels:
        """How many of the two models use a GPU, if there is one."""
        pairs = ((self.detect.device, self.detect.model), (self.embed.device, self.embed.model))
        on_gpu = [device != "cpu" and can_use_gpu(model) for device, model in pairs]
        if all(on_gpu):
            return "all"
        return "some" if any(on_gpu) else "none"

    def count_stages_ahead(self, group: WorkerGroup, stages: tuple[Any, ...]) -> int:
        """Count the stages that work a batch ahead of a group's GPU: those before the first stage with a device."""
        if not group.gpus:
            return 0
        return next((n for n, stage in enumerate(stages) if hasattr(stage, "device")), 0)


def _choose_device(requested: str, model: str, group: WorkerGroup) -> str:
    """Choose the device of a model: the group's GPU, if it has one that the model can use and nothing else is set."""
    if requested != "auto":
        return requested
    return "cuda" if group.gpus and can_use_gpu(model) else "cpu"


def _format_settings(settings: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
