"""`facepipe review`: one machine, one token; decisions go into the gallery; hidden faces are never served."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import cv2
import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import Faces, append, rows
from helpers import run_facepipe

from facepipe.decisions import read_decisions
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.hidden import HiddenImages
from facepipe.review import ActError, ReviewPage, ReviewServer, ReviewSession, page
from pipelines.review import open_review

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)


def make_thumb(n: int) -> bytes:
    noise = np.random.default_rng(n).integers(0, 255, (14, 14, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.resize(noise, (112, 112)))[1])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 faces of 16 persons with every tenth label wrong, and the report of `clean`."""
    path = tmp_path_factory.mktemp("review") / "g"
    truth = np.repeat(np.arange(16), 10)
    labels = truth.copy()
    labels[::10] = np.roll(truth, 30)[::10]
    table = rows(truth, Faces().draw(truth, 0), 0)
    for name, values in (
        ("identity", [f"person{n}" for n in labels]),
        ("thumb", [make_thumb(n % 5) for n in range(len(truth))]),
    ):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    append(Gallery.create(str(path), DLIB), [table], "test")
    assert run_facepipe("clean", path, "--quiet")[0] == 0
    return path


@pytest.fixture
def gallery(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "g"))


class Client:
    """Requests as a browser's page sends them, and as others do."""

    def __init__(self, server: ReviewServer):
        self.port = server.server_port
        self.token = server.token

    def send(self, method: str, path: str, body: Any = None, **changed: str | None) -> tuple[int, bytes, Any]:
        """Send a request; headers in `changed` replace those of the page, None leaves one out."""
        headers: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers |= {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
            headers["Content-Length"] = str(len(data))
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.headers

    def get(self, path: str = "", **changed: str | None) -> tuple[int, bytes, Any]:
        return self.send("GET", f"/{self.token}/{path}", **changed)

    def post(self, path: str, body: Any, **changed: str | None) -> tuple[int, bytes, Any]:
        return self.send("POST", f"/{self.token}/{path}", body, **changed)


def serve(session: ReviewSession) -> Iterator[ReviewServer]:
    server = ReviewServer(session)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(gallery: Path) -> Iterator[ReviewServer]:
    yield from serve(open_review(str(gallery), "clean", "Ann"))


@pytest.fixture
def client(server: ReviewServer) -> Client:
    return Client(server)


def make_act(face: str, person: str = "somebody", act_id: str = "a1", **more: Any) -> dict[str, Any]:
    rows_of_act = [{"decision": "is", "faces": [face], "person": person}]
    return {"id": act_id, "at": 1_790_000_000_000 + int(act_id[1:]), "rows": rows_of_act, "why": "a test", **more}


def read_groups(content: bytes) -> list[dict[str, Any]]:
    text = content.decode()
    start = text.index('id="data">[') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])


def first_face(client: Client) -> str:
    return read_groups(client.get()[1])[0]["faces"][0]["id"]


def list_active(gallery: Path) -> list[tuple[str, int, str | None]]:
    decisions = read_decisions(str(gallery))
    rows_ = decisions.rows.select(["decision", "person"]).to_pylist()
    return [(row["decision"], int(face), row["person"]) for row, face in zip(rows_, decisions.face_id, strict=True)]


def test_the_page_and_its_pictures(client: Client) -> None:
    status, content, headers = client.get()
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'sha256-" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    groups = read_groups(content)
    assert len(groups) >= 16
    assert not any("jpeg" in face for group in groups for face in group["faces"]), "pictures have addresses"
    status, picture, headers = client.get(f"thumb/{groups[0]['faces'][0]['id']}")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (112, 112, 3)


def test_decide_undo_and_redo(client: Client, gallery: Path) -> None:
    face = first_face(client)
    assert client.post("decide", make_act(face))[0] == 200
    assert list_active(gallery) == [("is", int(face), "somebody")]
    row = read_decisions(str(gallery)).rows.to_pylist()[0]
    assert (row["who"], row["source"], row["why"]) == ("Ann", "review clean", "a test")
    # The same act again, as a browser may send it, changes nothing.
    assert client.post("decide", make_act(face))[0] == 200
    assert client.post("undo", {"id": "a1"})[0] == 200
    assert list_active(gallery) == []
    assert client.post("decide", make_act(face))[0] == 200
    assert list_active(gallery) == [("is", int(face), "somebody")]
    # Another answer to the same group replaces the first one, and its undo brings that back.
    assert client.post("decide", make_act(face, "other", "a2", group="g"))[0] == 200
    assert client.post("decide", make_act(face, "third", "a3", group="g"))[0] == 200
    assert list_active(gallery) == [("is", int(face), "third")]
    assert client.post("undo", {"id": "a3"})[0] == 200
    assert list_active(gallery) == [("is", int(face), "other")]
    # A page that is opened again shows what is decided.
    acts = client.get()[1].decode().split('id="server">')[1].split("</script>")[0]
    assert [act["id"] for act in json.loads(acts)["acts"]] == ["", "a1", "a2"]


@pytest.mark.parametrize(
    "changed",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": None},
        {"Host": "127.0.0.1"},
        {"Host": "[::1]:80"},
    ],
)
def test_other_hosts_are_refused(client: Client, changed: dict[str, str | None]) -> None:
    """DNS rebinding: a name of somebody else that resolves to this machine."""
    status, content, _ = client.get("", **changed)
    assert status in (400, 403)
    assert b"person" not in content
    assert client.post("decide", make_act("1"), **changed)[0] in (400, 403)


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_other_pages_cannot_decide(client: Client, gallery: Path, changed: dict[str, str | None]) -> None:
    face = first_face(client)
    changed = {name: value and value.format(port=client.port) for name, value in changed.items()}
    assert client.post("decide", make_act(face), **changed)[0] == 403
    assert list_active(gallery) == []


@pytest.mark.parametrize(
    "path",
    ["/", "/x/", "/{short}/", "/{token}x/", "/{token}", "/{token}/x", "/{token}/../x", "/{token}/thumb/../../faces",
     "/{token}/report.html", "/{token}/decide", "http://other/{token}/", "/{token}/thumb/x",
     "/{token}/thumb/99999999999999999999", "/{token}/thumb/-1", "/%C3%A9/", "/%2e%2e/"],
)  # fmt: skip
def test_there_is_no_other_route(client: Client, path: str) -> None:
    path = path.format(token=client.token, short=client.token[:-1])
    status, content, _ = client.send("GET", path)
    assert status == 404
    assert b"person" not in content


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "CONNECT"])
def test_there_is_no_other_method(client: Client, method: str) -> None:
    status, content, headers = client.send(method, f"/{client.token}/")
    assert status == 501
    assert b"<" not in content
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"1", b"[" * 100_000, b"\xff\xfe", b'{"id": "a"}',
     {"id": "a", "at": "now", "rows": []}, {"id": "a", "at": 1e400, "rows": [{"decision": "is", "faces": ["1"]}]}],
)  # fmt: skip
def test_bodies_that_are_no_acts(client: Client, gallery: Path, body: Any) -> None:
    assert client.post("decide", body)[0] in (400, 409)
    assert client.post("undo", body)[0] in (400, 409)
    assert list_active(gallery) == []


def test_bodies_that_are_too_large(client: Client) -> None:
    assert client.post("decide", b"{}", Content_Length=str(1 << 30))[0] == 413
    assert client.post("decide", b"{}", Content_Length="-1")[0] == 411
    assert client.post("decide", b"{}", Content_Length=None, Transfer_Encoding="chunked")[0] == 411


@pytest.mark.parametrize(
    "row",
    [
        {"decision": "undo", "faces": ["1"]},
        {"decision": "is", "faces": [1], "person": "x"},
        {"decision": "is", "faces": ["1"], "person": ["x"]},
        {"decision": "is", "faces": ["-1"], "person": "x"},
        {"decision": "is", "faces": "123", "person": "x"},
        {"decision": "same_as", "faces": ["1"], "other": "x"},
        {"decision": "is", "faces": ["7"], "person": "x"},
        {"decision": "is", "faces": [], "person": "x"},
    ],
)
def test_rows_that_cannot_be_saved(row: dict[str, Any], original: Path) -> None:
    session = open_review(str(original), "clean", "Ann")
    with pytest.raises(ActError):
        session.decide({"id": "a", "at": 1.0, "rows": [row]})
    assert list_active(original) == []


def test_erased_faces_are_never_served(client: Client, gallery: Path) -> None:
    group = read_groups(client.get()[1])[0]
    face, uri = group["faces"][0]["id"], group["faces"][0]["uri"]
    assert client.get(f"thumb/{face}")[0] == 200
    code, _, err = run_facepipe("erase", gallery, "--image", uri, "--quiet")
    assert code == 0, err
    assert client.get(f"thumb/{face}")[0] == 404
    content = client.get()[1].decode()
    assert face not in content
    assert uri not in content


def test_faces_of_a_recorded_erasure_are_not_served(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_review(str(gallery), "clean", "Ann")
    face = next(face for group in _render_groups(session) for face in group["faces"])
    assert session.page.read_thumb(int(face["id"])) is not None
    hidden = HiddenImages(pa.array([face["uri"]]), np.array([int(face["id"])], np.int64))
    monkeypatch.setattr(session.page._hidden, "read", lambda: hidden)
    assert session.page.read_thumb(int(face["id"])) is None
    # Groups with the face stay away as a whole: their titles and answers may name the person.
    assert face["id"] not in session.render(0)
    assert face["uri"] not in session.render(0)


def _render_groups(session: ReviewSession, part: int = 0) -> list[dict[str, Any]]:
    return read_groups(session.render(part).encode())


def test_parts_hold_each_group_once(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _render_groups(open_review(str(original), "clean", "Ann"))
    monkeypatch.setattr(page, "GROUPS_PER_PART", 5)
    session = open_review(str(original), "clean", "Ann")
    assert session.page.part_count == -(-len(whole) // 5)
    parts = [_render_groups(session, part) for part in range(session.page.part_count)]
    assert [group for part in parts for group in part] == whole
    assert max(map(len, parts)) == 5


def test_a_report_that_is_made_anew_is_read_anew(gallery: Path) -> None:
    session = open_review(str(gallery), "clean", "Ann")
    before = _render_groups(session)
    assert run_facepipe("clean", gallery, "--quiet", "--min-face-px", "1")[0] == 0
    assert len(_render_groups(session)) == len(before)


def test_errors(gallery: Path, tmp_path: Path) -> None:
    code, _, err = run_facepipe("review", tmp_path / "none")
    assert (code, "no gallery at" in err) == (1, True)
    code, _, err = run_facepipe("review", gallery, "--report", "cluster")
    assert (code, f"`facepipe cluster {gallery}` makes it" in err) == (1, True)
    code, _, err = run_facepipe("review", gallery, "--report", "graph")
    assert code == 2
    taken = ReviewServer(ReviewSession(ReviewPage(str(gallery), "clean", f"{gallery}/reports/clean/report.html"), ""))
    code, _, err = run_facepipe("review", gallery, "--port", str(taken.server_port))
    taken.server_close()
    assert (code, "address already in use" in err) == (1, True)


def test_the_command_from_start_to_ctrl_c(gallery: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from jobs.cli import app; app()", "review", str(gallery), "--who", "Ann"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    host, token = address.removeprefix("http://").strip("/").split("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{token}/")
    assert connection.getresponse().status == 200
    # The open connection does not keep the command alive.
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    connection.close()
    assert (process.returncode, out) == (0, "")
    assert "0 decisions saved" in err
    assert "Traceback" not in err


def test_in_a_browser(server: ReviewServer, gallery: Path, tmp_path: Path) -> None:
    if browser.PROGRAM is None:
        pytest.skip("no Chromium: `apt-get install chromium` brings one")
    tab = browser.Browser(tmp_path / "profile")
    try:
        tab.open(server.address)
        tab.wait("document.images.length > 5 && document.images[0].naturalWidth === 112")
        tab.press("j", "a", "r")
        decided = "document.getElementById('progress-text').textContent"
        assert tab.run(decided).startswith("2 of ")
        tab.wait("fetch(location.pathname).then((answer) => answer.ok)")
        for expected in (2, 1):
            for _ in range(1000):
                if len(list_active(gallery)) == expected:
                    break
                tab.wait("new Promise((done) => setTimeout(() => done(true), 10))")
            assert len(list_active(gallery)) == expected
            if expected == 2:
                tab.press("u")
        tab.open(server.address)
        assert tab.run(decided).startswith("1 of ")
        assert tab.run("Object.keys(localStorage).length") == 0, "nothing stays in the browser"
        assert tab.messages == []
        assert {request.split("/")[2] for request in tab.requests} == {f"127.0.0.1:{server.server_port}"}
    finally:
        tab.close()


def test_look_decide_apply_and_clean_again(gallery: Path, tmp_path: Path) -> None:
    """From the page in a browser to the next run of the command."""
    if browser.PROGRAM is None:
        pytest.skip("no Chromium: `apt-get install chromium` brings one")
    tab = browser.Browser(tmp_path / "profile")
    folder = tmp_path / "downloads"
    folder.mkdir()
    try:
        tab.open(gallery / "reports" / "clean" / "report.html")
        # The first label is wrong, the second one right.
        tab.press("j", "a", "r")
        tab.save_downloads(folder)
        tab.click("#export-open")
        command = tab.run("document.getElementById('command').textContent").split()
        tab.click("#download")
        for _ in range(1000):
            if list(folder.glob("*.jsonl")):
                break
            tab.wait("new Promise((done) => setTimeout(() => done(true), 10))")
    finally:
        tab.close()
    (file,) = folder.glob("*.jsonl")
    # The fixture's gallery is a copy: the page names the place where the report was made.
    assert (command[:2], command[3:]) == (["facepipe", "apply"], [file.name])
    code, _, err = run_facepipe("apply", gallery, file)
    assert code == 0, err
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    decided = {int(line["face_id"]): line["person"] for line in lines}
    assert {face: person for _, face, person in list_active(gallery)} == decided
    assert len(decided) == 2
