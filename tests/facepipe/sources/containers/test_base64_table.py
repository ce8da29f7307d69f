"""Tables in base64: lines that hold no image, that are damaged, or too large, are rows; names stay short."""

import base64
from pathlib import Path

import pyarrow as pa

from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.containers.base64_table import is_base64_table
from facepipe.stages.read import Read

IMAGE = base64.b64encode(b"\xff\xd8\xff" + bytes(300)).decode()


def read(path: Path, max_bytes: int = 1 << 20) -> list[tuple[str, str | None]]:
    items = list(open_source(SourceConfig(str(path))))
    assert all(len(item.uri) < 700 for item in items)
    table = pa.Table.from_pylist([{**item._asdict(), "previous": None} for item in items], WORK_ITEM)
    found = Read(max_bytes=max_bytes)(table)
    return list(zip(found["status"].to_pylist(), found["error"].to_pylist(), strict=True))


def test_bad_lines_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "celeb.tsv"
    lines = [
        f"m.01\t1\tu\tp\tFaceId-0\tbox\t{IMAGE}",
        "m.01 no tabs",
        "m.02\t1\tu\tp\tFaceId-0\tbox\t",
        "",
        f"m.03\t1\tu\tp\tFaceId-0\tbox\t{IMAGE[:50]}!{IMAGE[51:]}",
        f"{'x' * 5000}\t1\tu\tp\tFaceId-0\tbox\t{IMAGE}",
        f"m.04\t1\tu\tp\tFaceId-0\tbox\t{IMAGE * 9}",
        f"m.05\t1\tu\tp\tFaceId-0\tbox\t{IMAGE[:-3]}",
    ]
    path.write_text("\n".join(lines))
    found = read(path, max_bytes=2000)
    assert [status for status, _ in found] == [
        "ok",
        "read_error",
        "read_error",
        "read_error",
        "ok",
        "too_large",
        "read_error",
    ]
    assert "holds no image" in str(found[1][1])
    assert "not base64" in str(found[3][1])


def test_other_tables_are_lists(tmp_path: Path) -> None:
    for text in ("path\tidentity\na.jpg\tann\n", "", "a.jpg\tann\n", "a\tb\tc.jpg\n"):
        (tmp_path / "list.tsv").write_text(text)
        assert not is_base64_table(str(tmp_path / "list.tsv"))
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "list.tsv").write_text("path\tidentity\na.jpg\tann\n")
    (item,) = open_source(SourceConfig(str(tmp_path / "list.tsv")))
    assert item.identity == "ann"
