"""The house has three floors, imports only point downward, and the front door is light.

A room is a package right below `facepipe/` or `pipelines/`, or a module there. Imports are read from the syntax tree, so
those inside functions and below `if TYPE_CHECKING` count.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY

import facepipe

FLOORS = ["facepipe", "pipelines", "jobs"]

# Rooms that still import each other, directly or through others. The test asks to remove an entry once it is gone.
KNOWN_CIRCLES_OF_ROOMS: set[tuple[str, ...]] = set()
# Files that still import each other.
KNOWN_CIRCLES_OF_FILES: set[tuple[str, ...]] = set()

Imports = dict[str, set[str]]


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


@cache
def read_imports() -> Imports:
    """Map each module of the library and the pipelines to the modules of these that it imports."""
    trees: dict[str, ast.Module] = {}
    for floor in ("facepipe", "pipelines"):
        for path in (REPOSITORY / floor).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text())
    return {name: set(find_imports(tree, trees.keys() - {name})) for name, tree in trees.items()}


def find_imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Yield the modules that a file imports. `from package import module` is an import of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif node.module in modules:
                    yield node.module or ""


def group_by_room(imports: Imports) -> Imports:
    """Map each room to the other rooms that its files import."""
    rooms: Imports = {}
    for module, targets in imports.items():
        # `facepipe/__init__.py` is no room: it hands out the public names of all of them.
        if module not in FLOORS:
            own = to_room(module)
            rooms.setdefault(own, set()).update({to_room(target) for target in targets} - {own, *FLOORS})
    return rooms


def to_room(module: str) -> str:
    """Shorten a module's name to its room, `facepipe.index.search` to `facepipe.index`."""
    return ".".join(module.split(".")[:2])


def find_circles(imports: Imports) -> set[tuple[str, ...]]:
    """Find the groups, each sorted, that import each other directly or through others."""
    reachable = {name: find_reachable(name, imports) for name in imports}
    circles = set()
    for name, targets in reachable.items():
        circle = {other for other in targets if name in reachable[other]}
        if circle:
            circles.add(tuple(sorted(circle)))
    return circles


def find_reachable(start: str, imports: Imports) -> set[str]:
    """Collect what a module imports directly or through others."""
    reachable: set[str] = set()
    pending = [start]
    while pending:
        for target in imports.get(pending.pop(), set()) - reachable:
            reachable.add(target)
            pending.append(target)
    return reachable


def test_rooms_do_not_import_each_other() -> None:
    circles = find_circles(group_by_room(read_imports()))
    assert not circles - KNOWN_CIRCLES_OF_ROOMS
    assert not KNOWN_CIRCLES_OF_ROOMS - circles, "gone: remove it from KNOWN_CIRCLES_OF_ROOMS"


def test_files_do_not_import_each_other() -> None:
    circles = find_circles(read_imports())
    assert not circles - KNOWN_CIRCLES_OF_FILES
    assert not KNOWN_CIRCLES_OF_FILES - circles, "gone: remove it from KNOWN_CIRCLES_OF_FILES"


def test_circles_are_found_in_lazy_imports() -> None:
    tree = ast.parse("def load():\n    from facepipe.b import run\n    import facepipe.c\n    from facepipe.d import e")
    modules = {"facepipe.b", "facepipe.c", "facepipe.d.e"}
    assert set(find_imports(tree, modules)) == modules
    imports = {"facepipe.a.x": {"facepipe.b.y"}, "facepipe.b.y": {"facepipe.b.z"}, "facepipe.b.z": {"facepipe.a.x"}}
    assert find_circles(imports) == {("facepipe.a.x", "facepipe.b.y", "facepipe.b.z")}
    assert find_circles(group_by_room(imports)) == {("facepipe.a", "facepipe.b")}


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


def test_the_architecture_page_names_every_folder() -> None:
    page = (REPOSITORY / "ARCHITECTURE.md").read_text()
    for floor in FLOORS:
        for init in (REPOSITORY / floor).glob("*/**/__init__.py"):
            assert f"{init.parent.name}/`" in page, init.parent
