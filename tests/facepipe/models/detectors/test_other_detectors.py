"""YuNet and SCRFD graphs, dlib's HOG, and the landmarks of detectors that give boxes only."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from facepipe.errors import ConfigError, MissingPackageError, ModelError
from facepipe.gallery import Contract
from facepipe.imaging.dlib_chip import PredictPoints, find_dlib_square
from facepipe.models.detectors import dlib_hog
from facepipe.models.detectors.dlib_hog import DlibHog
from facepipe.models.detectors.five_points import predict_landmarks, to_five_points
from facepipe.models.detectors.nms import apply_nms, apply_nms_by_smaller
from facepipe.models.detectors.onnx_input import DetectorGraph
from facepipe.models.detectors.retinaface_decode import apply_sorted_nms
from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace
from facepipe.models.detectors.scrfd import Scrfd
from facepipe.models.detectors.yunet import YuNet
from facepipe.models.dlib.predictor import load_predictor
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.packaged import read_retinaface_onnx
from facepipe.models.zoo.registry import find_card

HOSTILE = [(1, 1), (11, 11), (4, 3000), (3000, 4)]
LEVELS = {8: 1, 16: 2, 32: 4}


@pytest.fixture(scope="module")
def predictor() -> PredictPoints:
    return load_predictor().predict


def photo(folder: Path, name: str, side: int = 480) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2RGB)
    scale = side / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def boxes_at_random(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    corner = rng.uniform(0, 80, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 40, (n, 2))], 1), rng.permutation(n) / n + 0.001


@pytest.mark.parametrize("n", [0, 1, 7, 200])
@pytest.mark.parametrize("max_iou", [0.0, 0.3, 0.7, 1.0])
def test_suppression_by_iou(n: int, max_iou: float) -> None:
    boxes, scores = boxes_at_random(n)
    order = np.argsort(-scores)
    assert apply_nms(boxes, scores, max_iou).tolist() == order[apply_sorted_nms(boxes[order], max_iou)].tolist()


def test_suppression_by_the_smaller_box() -> None:
    boxes = np.array([[0, 0, 99, 99], [40, 40, 49, 49], [200, 0, 209, 9], [205, 0, 244, 39]], float)
    assert apply_nms_by_smaller(boxes, np.array([0.9, 0.8, 0.7, 0.6]), 0.7).tolist() == [0, 2, 3]
    assert apply_nms_by_smaller(boxes, np.array([0.6, 0.8, 0.7, 0.9]), 0.7).tolist() == [3, 1, 2]
    assert apply_nms_by_smaller(boxes, np.array([0.9, 0.8, 0.7, 0.6]), 0.4).tolist() == [0, 2]
    assert apply_nms_by_smaller(np.empty((0, 4)), np.empty(0), 0.5).tolist() == []


def model(nodes: list[Any], outputs: dict[str, Any], constants: dict[str, Any], shape: list[Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "faces",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    ).SerializeToString()
    return data


def random_yunet(height: int, width: int, fixed: bool, scale: float = 0.0) -> bytes:
    """A graph with YuNet's outputs for one input size, at random; `scale` times the mean of the first channel is
    added to every score.
    """
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Slice", ["input", "zero", "one", "axis"], ["first"]),
        node("ReduceMean", ["first"], ["mean"], axes=[1, 2, 3], keepdims=1),
        node("Reshape", ["mean", "flat"], ["level"]),
        node("Mul", ["level", "scale"], ["bright"]),
        node("Mul", ["level", "nothing"], ["dark"]),
    ]
    constants = {k: np.array([v]) for k, v in (("zero", 0), ("one", 1), ("axis", 1))}
    constants |= {"flat": np.array([1, 1, 1]), "scale": np.full((1, 1, 1), scale, np.float32)}
    constants["nothing"] = np.zeros((1, 1, 1), np.float32)
    outputs = {}
    for kind, columns in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in LEVELS:
            size = (1, (height // stride) * (width // stride), columns)
            values = rng.random(size) - 100 * bool(scale) if columns == 1 else rng.normal(0, 0.5, size)
            constants[f"c_{kind}_{stride}"] = values.astype(np.float32)
            nodes.append(
                node("Add", [f"c_{kind}_{stride}", "bright" if columns == 1 else "dark"], [f"{kind}_{stride}"])
            )
            outputs[f"{kind}_{stride}"] = size
    return model(nodes, outputs, constants, [1, 3, height, width] if fixed else [1, 3, "h", "w"])


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("size", [(90, 120), (96, 128), (65, 97)])
def test_yunet_decodes_as_opencv_does(fixed: bool, size: tuple[int, int], tmp_path: Path) -> None:
    graph = random_yunet(96, 128, fixed)
    (tmp_path / "yunet.onnx").write_bytes(graph)
    theirs = cv2.FaceDetectorYN.create(str(tmp_path / "yunet.onnx"), "", size[::-1], 0.8, 0.3, 5000)
    rows = theirs.detect(np.zeros((*size, 3), np.uint8))[1]
    faces = YuNet(graph, DetectionLimits(0.8, 0.3)).detect(np.zeros((1, *size, 3), np.uint8))[0]
    assert len(rows) == len(faces.scores) > 5
    rows = rows[np.argsort(-rows[:, 14], kind="stable")]
    assert np.abs(rows[:, :2] - faces.boxes[:, :2]).max() < 1e-3
    assert np.abs(rows[:, :2] + rows[:, 2:4] - faces.boxes[:, 2:]).max() < 1e-3
    assert np.abs(rows[:, 4:14].reshape(-1, 5, 2) - faces.landmarks).max() < 1e-3
    assert np.abs(rows[:, 14] - faces.scores).max() < 1e-5


def test_yunet_takes_bgr_up_to_255() -> None:
    detector = YuNet(random_yunet(96, 128, fixed=False, scale=0.5), DetectionLimits(0.8, 1.0))
    blue, red = np.zeros((2, 1, 96, 128, 3), np.uint8)
    blue[..., 2], red[..., 0] = 255, 255
    assert len(detector.detect(blue)[0].scores) > 100  # scores rise by 127, from -100 on
    assert len(detector.detect(red)[0].scores) == 0


def test_a_fixed_size_shrinks_larger_images() -> None:
    detector = YuNet(random_yunet(96, 128, fixed=True), DetectionLimits(0.8, 0.3))
    small = detector.detect(np.zeros((1, 96, 128, 3), np.uint8))[0]
    large = detector.detect(np.zeros((1, 384, 512, 3), np.uint8))[0]
    assert np.abs((small.boxes + 0.5) * 4 - 0.5 - large.boxes).max() < 1e-3
    assert np.abs((small.landmarks + 0.5) * 4 - 0.5 - large.landmarks).max() < 1e-3


def test_padding_is_black_and_on_the_right_and_below() -> None:
    image = np.full((40, 70, 3), 200, np.uint8)
    fitted = DetectorGraph(random_yunet(96, 128, fixed=True), "a test").fit(image)
    assert fitted.pixels.shape == (96, 128, 3)
    assert (fitted.pixels[:40, :70] == 200).all()
    assert fitted.pixels.sum() == 200 * 40 * 70 * 3
    assert DetectorGraph(random_yunet(96, 128, fixed=False), "a test").fit(image).pixels.shape == (64, 96, 3)


BOX = np.array([1.5, 2.0, 2.5, 3.0])
POINTS = np.array([(-0.8, -0.6), (0.8, -0.5), (0.1, 0.2), (-0.6, 0.9), (0.7, 1.0)])


def scrfd(shape: list[Any], batch: bool = False, kinds: tuple[int, ...] = (1, 4, 10)) -> bytes:
    """A graph with SCRFD's outputs that sees a face at every pixel whose red is 255, where an anchor lies on it.

    The second anchor of a point scores half as much. Distances in strides are BOX and POINTS times 1, 2, 4.
    """
    node = helper.make_node
    constants = {"to": np.array([1 << 30] * 2), "axes": np.array([2, 3]), "from": np.array([0, 0])}
    constants |= {"red0": np.array([0]), "red1": np.array([1]), "channel": np.array([1])}
    constants |= {"anchors": np.array([1, 0.5], np.float32).reshape(1, 1, 2), "low": np.zeros((), np.float32)}
    constants |= {"rows": np.array([1, -1, 1] if batch else [-1, 1]), "column": np.array([1, -1, 1])}
    nodes = [node("Slice", ["input", "red0", "red1", "channel"], ["red"])]
    for stride, size in LEVELS.items():
        constants[f"step_{stride}"] = np.array([stride, stride])
        nodes += [
            node("Slice", ["red", "from", "to", "axes", f"step_{stride}"], [f"at_{stride}"]),
            node("Max", [f"at_{stride}", "low"], [f"seen_{stride}"]),
            node("Reshape", [f"seen_{stride}", "column"], [f"flat_{stride}"]),
            node("Mul", [f"flat_{stride}", "anchors"], [f"twice_{stride}"]),
            node("Reshape", [f"twice_{stride}", "rows"], [f"s{stride}_1"]),
        ]
        for columns, distances in ((4, BOX), (10, POINTS.reshape(-1))):
            constants[f"d_{stride}_{columns}"] = (distances * size).astype(np.float32)[None]
            constants[f"none_{stride}"] = np.zeros(1, np.float32)
            nodes.append(node("Mul", [f"s{stride}_1", f"none_{stride}"], [f"zero_{stride}_{columns}"]))
            nodes.append(node("Add", [f"zero_{stride}_{columns}", f"d_{stride}_{columns}"], [f"s{stride}_{columns}"]))
    outputs = dict.fromkeys(f"s{stride}_{columns}" for columns in kinds for stride in LEVELS)
    return model(nodes, outputs, constants, shape)


def expected(pixels: list[tuple[int, int]]) -> list[tuple[float, ...]]:
    """Box, landmarks and score of the faces that the graph sees, by the definition of SCRFD's outputs."""
    faces = []
    for x, y in pixels:
        for stride, size in LEVELS.items():
            if x % stride == 0 and y % stride == 0:
                left, top, right, bottom = BOX * size * stride
                points = [c for px, py in POINTS * size * stride for c in (x + px, y + py)]
                box = (x - left, y - top, x + right, y + bottom)
                faces += [(*box, *points, score) for score in (0.99609375, 0.498046875)]
    return sorted(faces)


def found(faces: Any) -> list[tuple[float, ...]]:
    rows = np.concatenate([faces.boxes, faces.landmarks.reshape(-1, 10), faces.scores[:, None]], 1)
    return sorted(tuple(float(v) for v in row) for row in rows)


@pytest.mark.parametrize("shape", [[1, 3, "h", "w"], ["n", 3, None, None], [1, 3, 160, 224]])
@pytest.mark.parametrize("batch", [False, True])
def test_scrfd_decodes_what_was_encoded(shape: list[Any], batch: bool) -> None:
    image = np.zeros((1, 150, 203, 3), np.uint8)
    pixels = [(8, 40), (104, 72), (96, 128), (176, 16), (200, 144), (5, 9)]
    for x, y in pixels:
        image[0, y, x] = (255, 0, 0)
    image[0, 80, 80] = (0, 255, 255)  # no red
    faces = Scrfd(scrfd(shape, batch), DetectionLimits(0.4, 1.0)).detect(image)[0]
    wanted = expected(pixels)
    assert len(wanted) == 2 * (1 + 1 + 3 + 2 + 1)
    assert np.abs(np.array(found(faces)) - np.array(wanted)).max() < 1e-4
    assert (np.diff(faces.scores) <= 0).all()
    assert len(Scrfd(scrfd(shape, batch), DetectionLimits(0.4, 0.4)).detect(image)[0].scores) < len(wanted) / 2 + 1
    assert len(Scrfd(scrfd(shape, batch), DetectionLimits(0.6, 1.0)).detect(image)[0].scores) == len(wanted) / 2


def test_scrfd_without_landmarks_is_refused() -> None:
    with pytest.raises(ModelError, match="no landmarks"):
        Scrfd(scrfd([1, 3, "h", "w"], kinds=(1, 4)), DetectionLimits(0.5, 0.4))


@pytest.mark.parametrize("kind", [YuNet, Scrfd])
def test_other_graphs_are_refused(kind: Any) -> None:
    identity = [helper.make_node("Identity", ["input"], ["out"])]
    with pytest.raises(ModelError, match=r"is not .*(cls_8|1 outputs)"):
        kind(model(identity, {"out": None}, {}, [1, 3, "h", "w"]), DetectionLimits(0.5, 0.4))
    with pytest.raises(ModelError, match="no single float image"):
        kind(model(identity, {"out": None}, {}, [1, 80]), DetectionLimits(0.5, 0.4))
    with pytest.raises(ModelError, match="cannot load"):
        kind(b"no graph", DetectionLimits(0.5, 0.4))
    nine = [helper.make_node("Identity", ["input"], [f"o{n}"]) for n in range(9)]
    if kind is Scrfd:
        with pytest.raises(ModelError, match=r"outputs of the shapes .* missing"):
            Scrfd(
                model(nine, dict.fromkeys(f"o{n}" for n in range(9)), {}, [1, 3, "h", "w"]), DetectionLimits(0.5, 0.4)
            )
    else:
        with pytest.raises(ModelError, match="has shape"):
            YuNet(random_yunet(96, 128, fixed=False), DetectionLimits(0.5, 0.4)).detect(
                np.zeros((1, 300, 300, 3), np.uint8)
            )


@pytest.mark.parametrize("shape", HOSTILE)
def test_graphs_take_images_of_any_shape(shape: tuple[int, int]) -> None:
    image = np.zeros((2, *shape, 3), np.uint8)
    for size in ([1, 3, "h", "w"], [1, 3, 160, 224]):
        faces = Scrfd(scrfd(size), DetectionLimits(0.5, 0.4)).detect(image)
        assert [f.boxes.shape for f in faces] == [(0, 4)] * 2
        assert [f.landmarks.shape for f in faces] == [(0, 5, 2)] * 2


@pytest.mark.parametrize(
    ("name", "fed"), [("yunet", "BGR any size, (x - 0) / 1"), ("scrfd", "RGB any size, (x - 127.5) / 128")]
)
def test_graphs_of_files(name: str, fed: str, tmp_path: Path) -> None:
    """What a card says of the input is what is fed; dlib's points are not looked for in boxes that nobody compared."""
    (tmp_path / "d.onnx").write_bytes(random_yunet(96, 128, True) if name == "yunet" else scrfd([1, 3, 96, 128]))
    path = tmp_path / "d.toml"
    path.write_text(f'name = "d"\nrole = "detector"\narchitecture = "{name}"\nweights = "d.onnx"\n')
    found = find_card(str(path), "detector")
    assert (found.input, found.square, found.square_known) == (fed, None, False)
    assert len(found.load("cpu", 1, DetectionLimits(0.5, 0.4)).detect(np.zeros((1, 96, 128, 3), np.uint8))) == 1
    assert Contract.from_models(str(path), "dlib-resnet", True).detector == "d"
    with pytest.raises(ModelError, match="how the boxes of d lie to dlib's was never measured"):
        Contract.from_models(str(path), "face-recognition", False)
    path.write_text(path.read_text() + '[input]\nchannels = "rgb"\nscale = 2\n')
    with pytest.raises(ConfigError, match=f"input.channels, input.scale cannot be set for {name}"):
        find_card(str(path), "detector")


def mirrored(points: np.ndarray) -> np.ndarray:
    return points * [-1, 1]


CORNERS = np.array([(71.0, 40), (58, 42), (19, 41), (33, 43), (46, 70)])


def test_five_points_of_a_mirrored_face_are_mirrored() -> None:
    ours = to_five_points(CORNERS[None])[0]
    other = to_five_points(mirrored(CORNERS)[[2, 3, 0, 1, 4]][None])[0]
    assert np.abs(mirrored(other)[[1, 0, 2, 4, 3]] - ours).max() < 1e-4


def test_five_points_turn_and_grow_with_the_face() -> None:
    turn = 3 * np.array([[0.8, -0.6], [0.6, 0.8]])
    assert (
        np.abs(to_five_points((CORNERS @ turn.T + 7)[None])[0] - (to_five_points(CORNERS[None])[0] @ turn.T + 7)).max()
        < 1e-3
    )
    assert to_five_points(np.empty((0, 5, 2))).shape == (0, 5, 2)
    assert np.isfinite(to_five_points(np.zeros((1, 5, 2)))).all()


def test_five_points_are_near_those_of_a_detector(shared: Path, predictor: PredictPoints) -> None:
    detector = OnnxRetinaFace(read_retinaface_onnx(), DetectionLimits(0.7, 0.4))
    errors = []
    for file in sorted((shared / "data" / "lfw-dev" / "images").glob("*/*.jpg"))[7::190]:
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        padded = cv2.copyMakeBorder(image, 37, 37, 37, 37, cv2.BORDER_REFLECT_101)
        faces = detector.detect(padded[None])[0]
        n = np.abs(faces.landmarks[:, 2] - 111.5).max(1).argmin()  # the border mirrors faces too
        theirs = faces.landmarks[n] - 37
        ours = predict_landmarks(predictor, image, [find_dlib_square(faces.boxes[n] - 37, (0.0, 0.072, 0.989))])[0]
        errors.append(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs[1] - theirs[0]))
    assert len(errors) > 15
    assert (np.median(errors, 0) < [0.08, 0.08, 0.1, 0.14, 0.14]).all()


@pytest.fixture(scope="module")
def hog(predictor: PredictPoints) -> DlibHog:
    pytest.importorskip("dlib", reason="the package dlib is not installed")
    return DlibHog(predictor, DetectionLimits(0.7, 1.0))


@pytest.mark.parametrize(
    ("folder", "name"), [("portraits", "two.jpg"), pytest.param("photos", "couple.jpg", marks=pytest.mark.shared)]
)
def test_hog_gives_dlibs_boxes(hog: DlibHog, folder: str, name: str, request: pytest.FixtureRequest) -> None:
    import dlib

    image = photo(request.getfixturevalue(folder), name)
    faces = hog.detect(image[None])[0]
    h, w = image.shape[:2]
    wanted = [
        (max(r.left(), 0), max(r.top(), 0), min(r.right(), w), min(r.bottom(), h))
        for r in dlib.get_frontal_face_detector()(image, 1)
    ]
    assert sorted(map(tuple, faces.boxes.tolist())) == sorted(wanted)
    assert len(wanted) == 2
    assert (np.diff(faces.scores) <= 0).all()
    assert ((faces.scores > 0.7) & (faces.scores < 1)).all()
    assert (faces.landmarks[:, 0, 0] < faces.landmarks[:, 1, 0]).all()
    centre = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    assert (np.abs(faces.landmarks.mean(1) - centre) < 0.15 * (faces.boxes[:, 2:] - faces.boxes[:, :2])).all()


def test_hog_scores() -> None:
    assert dlib_hog.to_dlib_threshold(0.7) == 0
    margins = np.array([-0.5, 0.0, 0.3, 4.0])
    assert [dlib_hog.to_dlib_threshold(p) for p in dlib_hog._to_score(margins)] == pytest.approx(margins.tolist())
    assert np.isfinite([dlib_hog.to_dlib_threshold(0.0), dlib_hog.to_dlib_threshold(1.0)]).all()


@pytest.mark.parametrize("shape", HOSTILE)
def test_hog_takes_images_of_any_shape(hog: DlibHog, shape: tuple[int, int]) -> None:
    for value in (0, 255):
        faces = hog.detect(np.full((1, *shape, 3), value, np.uint8))[0]
        assert (faces.boxes.shape, faces.landmarks.shape, faces.scores.shape) == ((0, 4), (0, 5, 2), (0,))


def test_hog_without_dlib_says_so(predictor: PredictPoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(MissingPackageError, match=r"dlib-hog needs dlib, .*\[dlib\]|dlib-bin"):
        DlibHog(predictor, DetectionLimits(0.7, 0.4))


def test_a_config_that_names_haar_is_told_the_other_detectors() -> None:
    with pytest.raises(ModelError, match=r"'haar' was removed.*registered are: retinaface-mnet025, mtcnn, dlib-hog"):
        find_card("haar", "detector")


def test_graphs_of_these_tests_are_valid() -> None:
    for data in (random_yunet(96, 128, fixed=False), scrfd([1, 3, "h", "w"])):
        assert onnx.load_from_string(data).graph.output
