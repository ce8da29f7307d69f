"""The files in infra/ name things that exist. (No container engine runs where the tests do.)"""

import re
import tomllib

import pytest
from conftest import REPOSITORY

DOCKERFILES = sorted((REPOSITORY / "infra" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfiles(path) -> None:
    text = path.read_text()
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith(("#", " "))]
    for source in (name for word, rest in steps if word == "COPY" for name in rest.split()[:-1]):
        assert (REPOSITORY / source).exists(), source
    image = next(rest for word, rest in steps if word == "FROM")
    assert re.search(r":\d", image), "a pinned base"
    user = next(rest for word, rest in reversed(steps) if word == "USER")
    assert user not in ("root", "0")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f'ENTRYPOINT ["{next(iter(project["scripts"]))}"]' in text
    extras = re.search(r"'\.\[([^]]+)\]'", text)
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
