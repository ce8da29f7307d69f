"""What `embed` can be told: one section a stage, one for the source, one for the run."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from facepipe.gallery import Contract
from facepipe.models.zoo.networks import can_run_resident
from facepipe.sources import SourceConfig
from facepipe.sources.blocks import BlockSize
from facepipe.stages import Align, Decode, Detect, Embed, Read
from facepipe.stages.resident.stage import FacesOnDevice
from pipelines.runtime.plan import Layout, WorkerGroup, WorkerPlan

MODEL_STAGES = ("detect", "align", "embed")
Count = Annotated[int, Field(ge=1)]

Runner = Literal["auto", "inline", "local", "ray"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RunConfig:
    """How the work is run; none of it but `precision` changes what comes out.

    runner: local (processes on this machine), ray, inline (this process), or auto: local, but ray for more than
        auto_images images where RAY_ADDRESS names a cluster (or layout is split, which only Ray runs)
    workers: how many; by default one a CPU, or one a GPU where there are GPUs
    layout: fused (one worker runs all stages) or split (CPU workers decode, GPU workers run the models)
    batch: images a worker holds decoded at a time; by default 16, and 256 where it has a GPU
    resident: on a GPU pixels stay there from detection to embedding, with RetinaFace and torch embedders; false: the
        stages one by one, as on a CPU. The faces are the same
    precision: of the networks in a `resident` chain: float32, bfloat16 or float16. Half precision moves vectors by some
        0.002 (float16) or 0.01 (bfloat16) as a median, where two people are 0.4 apart
    block_smallest, block_largest: images of one unit of work, which is one Parquet file; by default at most 512,
        and 4096 where there are GPUs, whose pipeline runs empty at the end of each
    commit_seconds: finished work becomes visible this often, or when twenty times of what a commit took have passed
    """

    runner: Runner = "auto"
    auto_images: Count = 500
    workers: Count | None = None
    layout: Layout = "fused"
    batch: Count | None = None
    resident: bool = True
    precision: Precision = "float32"
    block_smallest: Count = 16
    block_largest: Count | None = None
    commit_seconds: float = 10.0

    def choose_block_size(self, plan: WorkerPlan) -> BlockSize:
        """How to cut the work for a plan."""
        return BlockSize(self.block_smallest, self.block_largest or plan.largest_block, plan.workers)


@dataclass(frozen=True)
class MissingConfig:
    """What becomes of images that the gallery holds of this source, and the source lists no more.

    policy: keep (nothing) or mark (their rows get the time in `missing_since`; a later listing takes it off again)
    at_most: share of the source's images; where more are gone at once none is marked, since the source itself is
        then likelier to be at fault (not mounted, another folder of the same name)
    """

    policy: Literal["keep", "mark"] = "keep"
    at_most: Annotated[float, Field(ge=0, le=1)] = 0.1


@dataclass(frozen=True)
class EmbedConfig:
    """Everything `embed` can be told: one section a stage, one for the source, for what is missing and for the run."""

    source: SourceConfig = field(default_factory=SourceConfig)
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)
    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    missing: MissingConfig = field(default_factory=MissingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def contract(self) -> Contract:
        """What the embeddings depend on."""
        return Contract.from_models(self.detect.model, self.embed.model, self.embed.flip)

    @property
    def warning(self) -> str:
        """What is likely not meant, though it runs; empty where there is nothing."""
        if self.embed.model != "face-recognition" or not self.embed.flip:
            return ""
        return (
            "with embed.flip the mirror image is averaged in, which the library face_recognition does not do: its own "
            "vectors come with --config face_recognition.toml, or with --set embed.flip=false"
        )

    def build_stages(self, group: WorkerGroup) -> tuple[Any, ...]:
        """The stages of a group, set to the group's device and threads."""
        given = "cuda" if group.gpus else "cpu"
        device = {part: given if part.device == "auto" else part.device for part in (self.detect, self.embed)}
        chain: dict[str, Any] = {
            "read": self.read,
            "decode": replace(self.decode, threads=max(self.decode.threads, group.threads)),
            "detect": replace(self.detect, device=device[self.detect], threads=group.threads),
            "align": replace(self.align, embedder=self.embed.model, detector=self.detect.model),
            "embed": replace(self.embed, device=device[self.embed], threads=group.threads),
        }
        names = group.stages
        if (
            group.gpus
            and self.run.resident
            and names[-3:] == MODEL_STAGES
            and self._runs_resident(set(device.values()))
        ):
            parts: dict[str, Any] = {name: chain[name] for name in MODEL_STAGES}
            made = FacesOnDevice(**parts, device=device[self.detect], threads=group.threads)
            chain["faces"] = replace(made, precision=self.run.precision)
            names = (*names[:-3], "faces")
        return tuple(chain[name] for name in names)

    def _runs_resident(self, devices: set[str]) -> bool:
        """Whether both models are torch modules on the same GPU."""
        same = len(devices) == 1 and next(iter(devices)).startswith("cuda")
        return same and can_run_resident(self.detect.model, self.embed.model)

    def count_stages_ahead(self, group: WorkerGroup, stages: tuple[Any, ...]) -> int:
        """How many of a group's stages work a batch ahead of its GPU: those in front of the first that is on one."""
        return next((n for n, stage in enumerate(stages) if hasattr(stage, "device")), 0) if group.gpus else 0
