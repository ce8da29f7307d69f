"""embed on GPU workers: what they run, and that a gallery made on a device is the one that the stages make."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import embed, rows

from facepipe.stages import Decode, Detect, Embed, Read
from facepipe.stages.resident.stage import FacesOnDevice
from pipelines.embed import config as embed_config
from pipelines.embed import pipeline as module
from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.runtime.plan import STAGES, Resources, WorkerGroup, WorkerPlan, make_plan

GPU = make_plan(Resources(16, 2)).groups[0]


def test_a_gpu_worker_keeps_pixels_on_its_device() -> None:
    config = EmbedConfig(detect=Detect(min_score=0.8), run=RunConfig(precision="float16"))
    read, decode, faces = config.build_stages(GPU)
    assert (read, decode.threads) == (Read(), 8)
    assert isinstance(faces, FacesOnDevice)
    assert (faces.device, faces.precision, faces.threads, faces.detect.min_score) == ("cuda", "float16", 8, 0.8)
    assert faces.align.embedder == "dlib-resnet"
    assert config.count_stages_ahead(GPU, (read, decode, faces)) == 2
    assert GPU.batch == 256


def test_a_split_plan_has_it_in_its_second_group() -> None:
    first, second = make_plan(Resources(16, 2), layout="split").groups
    config = EmbedConfig()
    assert [type(stage) for stage in config.build_stages(first)] == [Read, Decode]
    (faces,) = config.build_stages(second)
    assert isinstance(faces, FacesOnDevice)
    assert (
        config.count_stages_ahead(first, config.build_stages(first)),
        config.count_stages_ahead(second, (faces,)),
    ) == (0, 0)
    assert (first.batch, second.batch) == (16, 256)


@pytest.mark.parametrize(
    "config",
    [
        EmbedConfig(detect=Detect("mtcnn")),
        EmbedConfig(embed=Embed("fake-embedder")),
        EmbedConfig(run=RunConfig(resident=False)),
        EmbedConfig(detect=Detect(device="cpu")),
        EmbedConfig(detect=Detect(device="cuda:1")),
    ],
)
def test_other_models_keep_the_stages(config: EmbedConfig) -> None:
    names = [type(stage).__name__ for stage in config.build_stages(GPU)]
    assert names == ["Read", "Decode", "Detect", "Align", "Embed"]


def test_cpu_workers_are_what_they_were() -> None:
    (group,) = make_plan(Resources(4)).groups
    config = EmbedConfig()
    stages = config.build_stages(group)
    assert [type(stage).__name__ for stage in stages] == ["Read", "Decode", "Detect", "Align", "Embed"]
    assert (group.batch, config.count_stages_ahead(group, stages)) == (16, 0)


PHOTOS = ("img5", "img27", "img4", "img54", "couple", "img2", "img31")


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("portraits", ("one", "dark", "small", "two", "none")),
        pytest.param("photos", PHOTOS, marks=pytest.mark.shared),
    ],
)
def test_a_gallery_made_on_a_device_is_the_one_that_the_stages_make(
    folder: str,
    names: tuple[str, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole run, its device a CPU: reading and decoding ahead, blocks, parts, commit, summary."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in names:
        (corpus / f"{name}.jpg").symlink_to(request.getfixturevalue(folder) / f"{name}.jpg")
    (corpus / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    embed(corpus, tmp_path / "stages", runner="inline")

    def on_cpu(**given: Any) -> FacesOnDevice:
        return replace(FacesOnDevice(**given), device="cpu", frames=2, chips=4)

    monkeypatch.setattr(embed_config, "FacesOnDevice", on_cpu)
    monkeypatch.setattr(module, "make_plan", lambda *_: WorkerPlan((WorkerGroup(STAGES, 1, 2, 1),)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        summary = embed(corpus, tmp_path / "device", runner="inline", batch=3)
    finally:
        torch.set_num_threads(before)
    assert {"read", "findmoved", "decode", "facesondevice"} == set(summary.stage_seconds)
    assert summary.gpu is not None
    one, other = rows(tmp_path / "stages"), rows(tmp_path / "device")
    assert [(r["uri"], r["status"], r["face_id"], r["face_index"]) for r in one] == [
        (r["uri"], r["status"], r["face_id"], r["face_index"]) for r in other
    ]
    for a, b in zip(one, other, strict=True):
        if a["embedding"] is not None:
            assert a["box"] == pytest.approx(b["box"], abs=0.01)
            assert a["embedding"] == pytest.approx(b["embedding"], abs=1e-3)
