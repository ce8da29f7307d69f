"""embed on GPU workers: what they run, and that a gallery made on a device is the one that the stages make."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import embed, rows

from facepipe.models.detectors.retinaface_engines import TorchRetinaFace
from facepipe.models.embedders.engines import TorchEmbedder
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo import registry
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.packaged import load_dlib_net, load_retinaface_net
from facepipe.stages import Align, Decode, Detect, Embed, Read, detect
from facepipe.stages import embed as embed_stage
from pipelines.embed import pipeline as module
from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.runtime.plan import STAGES, Resources, WorkerGroup, WorkerPlan, make_plan
from pipelines.runtime.runners.local import _build_environment

GPU = make_plan(Resources(16, 2)).groups[0]


def test_a_gpu_worker_runs_the_stages_on_its_device() -> None:
    config = EmbedConfig(detect=Detect(min_score=0.8), run=RunConfig(precision="float16"))
    read, decode, detect, align, embed = stages = config.build_stages(GPU)
    assert (read, decode.threads) == (Read(), 8)
    assert (detect.device, detect.precision, detect.min_score) == ("cuda", "float16", 0.8)
    assert (embed.device, embed.precision) == ("cuda", "float16")
    assert align.embedder == "dlib-resnet"
    assert config.count_stages_ahead(GPU, stages) == 2
    assert (GPU.batch, GPU.parallel) == (256, 4)


def test_the_precision_of_a_stage_is_its_own_if_it_has_one() -> None:
    config = EmbedConfig(detect=Detect(precision="tf32"), run=RunConfig(precision="bfloat16"))
    stages = config.build_stages(GPU)
    assert (stages[2].precision, stages[4].precision) == ("tf32", "bfloat16")
    assert EmbedConfig().build_stages(GPU)[2].precision == "float32"


def test_a_split_plan_has_the_models_in_its_second_group() -> None:
    first, second = make_plan(Resources(16, 2), layout="split").groups
    config = EmbedConfig()
    assert [type(stage) for stage in config.build_stages(first)] == [Read, Decode]
    models = config.build_stages(second)
    assert [type(stage) for stage in models] == [Detect, Align, Embed]
    assert config.count_stages_ahead(first, config.build_stages(first)) == 0
    assert config.count_stages_ahead(second, models) == 0
    assert (first.batch, second.batch) == (16, 256)


def describe(config: EmbedConfig, cpus: int = 64, gpus: int = 1) -> tuple[int, float, float, str, str]:
    """Describe the workers of a config, and the devices of the two models on them."""
    (group,) = make_plan(Resources(cpus, gpus), None, "fused", config.gpu_models).groups
    stages = config.build_stages(group)
    return group.workers, group.cpus, group.gpus, stages[2].device, stages[4].device


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        (EmbedConfig(), (1, 64, 1, "cuda", "cuda")),
        (EmbedConfig(embed=Embed("face-recognition")), (1, 64, 1, "cuda", "cuda")),
        # Nothing on the GPU: as many workers as without one.
        (EmbedConfig(detect=Detect("mtcnn"), embed=Embed("dlib-resnet-int8")), (64, 1, 0, "cpu", "cpu")),
        (EmbedConfig(detect=Detect(device="cpu"), embed=Embed(device="cpu")), (64, 1, 0, "cpu", "cpu")),
        # One of the two: workers share the GPU, and use all CPUs.
        (EmbedConfig(embed=Embed("dlib-resnet-int8")), (8, 8, 1 / 8, "cuda", "cpu")),
        (EmbedConfig(detect=Detect("mtcnn")), (8, 8, 1 / 8, "cpu", "cuda")),
        (EmbedConfig(detect=Detect(device="cpu")), (8, 8, 1 / 8, "cpu", "cuda")),
    ],
    ids=["default", "face-recognition", "no-model", "cpu-asked", "int8", "mtcnn", "cpu-detector"],
)
def test_workers_follow_what_the_models_can_use(config: EmbedConfig, workers: tuple[object, ...]) -> None:
    assert describe(config) == workers


def test_workers_that_share_gpus_take_them_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = make_plan(Resources(32, 2), None, "fused", "some").groups
    assert (group.workers, group.cpus, group.gpus, group.devices) == (16, 2, 1 / 8, 2)
    assert (group.batch, group.parallel) == (32, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    visible = [_build_environment(group, number)["CUDA_VISIBLE_DEVICES"] for number in range(16)]
    assert visible == ["0", "1"] * 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _build_environment(group, 3)["CUDA_VISIBLE_DEVICES"] == "6"


def test_an_onnx_embedder_uses_a_gpu_if_its_runtime_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nweights = "graph.onnx"\nrole = "embedder"\ndim = 128\n'
        '[input]\nsize = [112, 112]\nchannels = "rgb"\nmean = [0.0, 0.0, 0.0]\nscale = [1.0, 1.0, 1.0]\n'
    )
    config = EmbedConfig(embed=Embed(str(path)))
    monkeypatch.setattr(EmbedConfig, "build_stages", lambda self, group: [Embed(device="cuda")] * 5)
    assert describe(config)[2] == 1 / 8, "this ONNX Runtime has no CUDA"
    monkeypatch.setattr("facepipe.models.zoo.devices.has_onnx_cuda", lambda: True)
    assert describe(config)[2] == 1


def test_cpu_workers_are_what_they_were() -> None:
    (group,) = make_plan(Resources(4)).groups
    config = EmbedConfig()
    stages = config.build_stages(group)
    assert [type(stage).__name__ for stage in stages] == ["Read", "Decode", "Detect", "Align", "Embed"]
    assert (group.batch, group.parallel, config.count_stages_ahead(group, stages)) == (16, 1, 0)


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

    def load_detector(device: str, threads: int, limits: DetectionLimits) -> TorchRetinaFace:
        return TorchRetinaFace(load_retinaface_net(), limits, "cpu", batches_on_cpu=True)

    def load_embedder(device: str, threads: int) -> TorchEmbedder:
        model_input = ARCHITECTURES["dlib-resnet"].input
        return TorchEmbedder(load_dlib_net(), model_input, (150, 150), device="cpu", batches_on_cpu=True)

    # The engines and batches of a GPU, on CPU tensors.
    for name, load in (("retinaface-mnet025", load_detector), ("dlib-resnet", load_embedder)):
        monkeypatch.setitem(registry.CARDS, name, replace(registry.CARDS[name], load=load))
    for stage in (detect, embed_stage):
        monkeypatch.setattr(stage, "resolve_device", lambda device: "cpu")
    monkeypatch.setattr(module, "make_plan", lambda *_: WorkerPlan((WorkerGroup(STAGES, 1, 2, 1),)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        summary = embed(corpus, tmp_path / "device", runner="inline", batch=3)
    finally:
        torch.set_num_threads(before)
    assert {"read", "findmoved", "decode", "detect", "align", "embed"} == set(summary.stage_seconds)
    assert summary.gpu is not None
    one, other = rows(tmp_path / "stages"), rows(tmp_path / "device")
    assert [(r["uri"], r["status"], r["face_id"], r["face_index"]) for r in one] == [
        (r["uri"], r["status"], r["face_id"], r["face_index"]) for r in other
    ]
    # A picture of an odd shape gets more padding in the batches of a GPU: boxes move by some hundredths of a pixel of the
    # detector's input, and the vectors with them (docs/performance.md).
    for a, b in zip(one, other, strict=True):
        if a["embedding"] is not None:
            assert a["box"] == pytest.approx(b["box"], abs=0.01 if folder == "portraits" else 1)
            assert np.linalg.norm(np.subtract(a["embedding"], b["embedding"])) < 0.03
