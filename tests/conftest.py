"""Fixtures that several test files share.

The suite reads nothing outside the repository and the installed packages. Tests marked `shared` are the exception: they
need photos and weights that we may not ship. They run only with `--shared=FOLDER` (`make test-shared`) and skip otherwise.
"""

import os
import signal
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Test files run side by side, one per core. OpenMP's threads wait for each other in a loop that keeps a core busy, so more
# than one per process would take the cores from other tests. The variable is read when FAISS and torch are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import hypothesis
import numpy as np
import pytest
from s3_server import serve_s3

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray would write a token into the home folder

# By default Hypothesis fails an example that takes longer than 200 ms, which on a busy machine any may.
hypothesis.settings.register_profile(
    "facepipe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("facepipe")

# A background job of a shell ignores Ctrl-C, and its children inherit that. The tests send Ctrl-C to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]

# Processes that the tests start import this clone's code, whichever clone the virtual environment belongs to.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the shared data."""
    parser.addoption("--shared", metavar="FOLDER", help="Folder of photos and weights for the tests marked `shared`.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that asks for the fixture `shared`, and put the slowest files first."""
    for item in items:
        # Directly or through another fixture.
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
    items.sort(key=lambda item: not item.path.is_relative_to(REPOSITORY / "tests" / "pipelines"))


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """Return the folder of the shared data, or skip the test if there is none."""
    folder = request.config.getoption("--shared")
    if not folder:
        pytest.skip("needs the shared data: pytest --shared=FOLDER")
    path = Path(folder).resolve()
    if not (path / "data").is_dir():
        pytest.skip(f"the shared data is not at {path}")
    return path


@pytest.fixture(scope="session")
def photos(shared: Path) -> Path:
    """Return the folder of 32 real photos in the shared data."""
    return shared / "data" / "photos-dev"


@pytest.fixture(scope="session")
def portrait() -> Path:
    """Return a photo with one face that every clone has: Grace Hopper, from matplotlib's sample data."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="session")
def portraits(portrait: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of five JPEGs made from the portrait, with five faces: a bare clone's stand-in for `photos`."""
    folder = tmp_path_factory.mktemp("portraits")
    image = np.asarray(cv2.imread(str(portrait)))
    small = cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    images = {
        "one": image,
        "dark": image // 2,
        "small": small,
        "two": np.hstack([small, small[:, ::-1]]),
        "none": np.full((300, 400, 3), 120, np.uint8),
    }
    for name, pixels in images.items():
        cv2.imwrite(str(folder / f"{name}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return folder


def draw(n: int, side: int = 96) -> np.ndarray:
    """Draw an image (BGR) with `n % 3` red rectangles, which the fake detector takes for faces.

    Every `n` gives a different image.
    """
    rng = np.random.default_rng(n)
    image = np.full((side, side + n % 7, 3), rng.integers(90, 255), np.uint8)
    for k in range(n % 3):
        x, y = (int(v) for v in rng.integers(0, side // 4, 2))
        low = (x + k * side // 2, y + k * side // 2)
        cv2.rectangle(image, low, (low[0] + 20 + n % 5, low[1] + 24), (30, 30, 230), -1)
    image[-3:] = rng.integers(0, 255, (3, image.shape[1], 3))
    return image


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 PNGs with 0 to 2 drawn faces each, in three subfolders."""
    root = tmp_path_factory.mktemp("drawings")
    for n in range(60):
        folder = root / f"person{n % 3}"
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"p{n % 3}_{n:03d}.png"), draw(n))
    return root


@pytest.fixture
def fakes() -> dict[str, dict[str, object]]:
    """Return settings that replace the models by fakes and cut the work into small blocks."""
    return {
        "detect": {"model": "fake-detector"},
        "embed": {"model": "fake-embedder"},
        "run": {"runner": "inline", "block_smallest": 4, "block_largest": 8, "commit_seconds": 0.1},
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Return the endpoint of an S3 server.

    It runs in a process of its own, because some calls of clients hold the interpreter's lock.
    """
    with serve_s3() as endpoint:
        yield endpoint


def describe_store(endpoint: str) -> dict[str, str]:
    """Return the environment of a process that uses the S3 server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Put an empty S3 store with a bucket `faces` into the environment, and return its client."""
    import boto3

    from facepipe import storage

    for name, value in {**describe_store(s3_server), "FACEPIPE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST")).close()
    storage.open_bucket.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="faces")
    yield client
    client.close()
    storage.open_bucket.cache_clear()
