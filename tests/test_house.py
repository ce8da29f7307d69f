"""The house has three floors, imports only point downward, and the front door is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import facepipe

FLOORS = ["facepipe", "pipelines", "jobs"]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downward(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    for path in (REPOSITORY / floor).rglob("*.py"):
        assert not imports(path) & above, path


def test_only_pipelines_know_of_ray() -> None:
    for floor in ("facepipe", "jobs"):
        for path in (REPOSITORY / floor).rglob("*.py"):
            assert "ray" not in imports(path), path


def test_importing_facepipe_is_light() -> None:
    code = "import sys, facepipe; print([m for m in ('ray', 'torch', 'faiss', 'cv2', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_embedding_on_a_cpu_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, facepipe, numpy as np; facepipe.encode([np.zeros((64, 64, 3), np.uint8)]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_every_public_name_exists() -> None:
    assert sorted(facepipe.__all__) == facepipe.__all__
    for name in facepipe.__all__:
        assert getattr(facepipe, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = facepipe.nothing


def test_every_error_stands_in_the_tree() -> None:
    from facepipe import errors

    drawn = errors.__doc__ or ""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert name in drawn
            assert kind.__doc__
