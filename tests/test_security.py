"""What docs/security.md promises: data are never code, secrets are never output, galleries lie encrypted and private."""

import ast
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, draw
from helpers import embed, rows

from facepipe import storage
from facepipe.config import build, parse_settings, read_toml
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, FacepipeError, StorageError, WeightsError
from facepipe.gallery import Gallery
from facepipe.gallery.table import open_table
from facepipe.hashing import hash64
from facepipe.imaging import header
from facepipe.index.queries import open_queries
from facepipe.index.search import Index
from facepipe.models.zoo import packaged
from facepipe.sources import SourceConfig, list_file, open_source, tar
from facepipe.stages import Decode, Read
from facepipe.storage import table_access
from facepipe.storage.hashtable import HashTable
from facepipe.storage.redact import redact
from facepipe.storage.store import open_store
from pipelines import erase, index
from pipelines.cluster import pipeline as cluster
from pipelines.dedup import pipeline as dedup
from pipelines.embed import EmbedConfig
from pipelines.nightly.config import NightlyConfig

G = "s3://faces/team/gallery"
DOCS = (REPOSITORY / "docs" / "security.md").read_text()

# ---------------------------------------------------------------- data are never code

# A private socket between a parent and the child that it started itself: docs/security.md says why that is safe.
TALK_PICKLE = {"pipelines/runtime/runners/local.py", "pipelines/runtime/runners/child.py"}
# The exception that torch's weights_only reader raises, and an unpickler that knows four names: tests/facepipe/models/detectors/test_mtcnn.py
# and test_embedders.py show that neither runs what it reads.
REFUSE_PICKLE = {
    "facepipe/models/checkpoint.py",
    "facepipe/models/detectors/mtcnn_weights.py",
    "facepipe/training/trainer/checkpointing.py",
}
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"extract", "extractall", "unpack_archive", "os.system", "os.popen"}


def faults(source: str) -> list[str]:
    """Where a module could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)):
                found += [module] if module.split(".")[0] in MODULES else []
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append(name)
            case ast.Call(func=ast.Attribute(attr=name) as call, keywords=keywords):
                given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in keywords}
                if not METHODS.isdisjoint((name, ast.unparse(call))) or given.get("shell", False) is not False:
                    found.append(name)
                if given.get("allow_pickle", False) is not False:
                    found.append("allow_pickle")
                if ast.unparse(call) == "torch.load" and given.get("weights_only") is not True:
                    found.append("torch.load")
    return found


@pytest.mark.parametrize("floor", ["facepipe", "pipelines", "jobs"])
def test_nothing_that_is_read_is_run(floor: str) -> None:
    for path in sorted((REPOSITORY / floor).rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        allowed = {"pickle"} if name in TALK_PICKLE | REFUSE_PICKLE else set()
        assert set(faults(path.read_text())) <= allowed, name


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import yaml",
        "eval('1')",
        "exec(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=asked)",
        "subprocess.run(c, shell=True)",
        "archive.extractall(d)",
        "os.system(c)",
    ],
)
def test_the_search_for_it_finds_it(source: str) -> None:
    assert faults(source)


def test_and_nothing_else() -> None:
    assert not faults("torch.load(f, weights_only=True); np.load(f); net.eval(); re.compile(x); subprocess.run([c])")


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "data were executed"


def test_a_payload_would_be_noticed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "x")))
    assert (tmp_path / "x").exists()


def objects(payload: Payload) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = payload
    return array


@pytest.mark.parametrize("kind", ["pickle", "torch", "code", "other"])
def test_weights_are_data(kind: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "pickle": pickle.dumps(Payload(trace)),
        "torch": b"PK\x03\x04" + pickle.dumps(Payload(trace)),
        "code": f"import pathlib\nWEIGHTS = pathlib.Path({str(trace)!r}).touch()".encode(),
        "other": b"WEIGHTS = b'another graph'",
    }
    for package, name in (
        ("retinaface", "weights.py"),
        ("face_recognition_models", "models/dlib_face_recognition_resnet_model_v1.dat"),
    ):
        file = tmp_path / "site" / package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / package / "__init__.py").write_text(
            f"import pathlib; pathlib.Path({str(trace)!r}).touch()"
        )
        file.write_bytes(bodies[kind])
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(WeightsError):
        packaged.read_retinaface_onnx.__wrapped__()
    with pytest.raises(WeightsError, match="not the registered file"):
        packaged.read_dlib_weights.__wrapped__()


@pytest.fixture(scope="module")
def gallery(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("security") / "g"
    models = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    embed(drawings, path, models, runner="inline")
    index.run(index.IndexConfig(), str(path))
    return path


@pytest.mark.parametrize("name", ["q.parquet", "q.npy", "q.pt", "q.pkl", "q.safetensors"])
def test_queries_are_data(name: str, trace: Path, tmp_path: Path, gallery: Path) -> None:
    path = tmp_path / name
    if name == "q.npy":
        np.save(path, objects(Payload(trace)), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Payload(trace)))

    def opened() -> None:
        if open_queries(str(path), Gallery(gallery).contract) is None:
            open_source(SourceConfig(str(path)))  # as images, then

    with pytest.raises(FacepipeError):
        opened()


def test_columns_are_data(trace: Path, tmp_path: Path, gallery: Path, fakes: dict[str, Any]) -> None:
    body = pickle.dumps(Payload(trace))
    pq.write_table(pa.table({"embedding": [body]}), tmp_path / "q.parquet")
    with pytest.raises(ConfigError, match="not a list"):
        open_queries(str(tmp_path / "q.parquet"), Gallery(gallery).contract)
    pq.write_table(pa.table({"bytes": [body]}), tmp_path / "i.parquet")
    assert embed(tmp_path / "i.parquet", tmp_path / "g", fakes).statuses == {"decode_error": 1}
    # pyarrow before 14.0.1 unpickled what a schema named so (CVE-2023-47248).
    marks = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": body}
    field = pa.field("embedding", pa.list_(pa.float32(), 128), metadata=marks)
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(1, 128, dtype=np.float32)[0]), 128)
    pq.write_table(pa.Table.from_arrays([column], schema=pa.schema([field])), tmp_path / "e.parquet")
    assert (pq.read_schema(tmp_path / "e.parquet").field(0).metadata or {})[b"ARROW:extension:metadata"] == body
    open_queries(str(tmp_path / "e.parquet"), Gallery(gallery).contract)


def test_an_index_is_data(trace: Path, tmp_path: Path, gallery: Path) -> None:
    folder = tmp_path / "g"
    subprocess.run(["cp", "-r", str(gallery), str(folder)], check=True)
    arrays = list((folder / "index").rglob("*.npy"))
    assert arrays
    for path in arrays:
        size = path.stat().st_size
        with path.open("wb") as file:
            np.save(file, objects(Payload(trace)), allow_pickle=True)
            file.write(b"\0" * (size - file.tell()))
    vectors = np.eye(1, 128, dtype=np.float32)
    with pytest.raises((FacepipeError, ValueError)):
        Index(str(folder)).search(vectors, k=1)


def test_a_config_is_data(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\x80\xff" + pickle.dumps(Payload(trace)))
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "c.toml")


# ---------------------------------------------------------------- secrets are never output

SECRET, TOKEN, PASSWORD, SIGNATURE = "hunter2/SEC+ret0key", "session-hunter3-token", "hunter4passw0rd", "5ig0hunter5"
HUNTED = [SECRET, TOKEN, PASSWORD, SIGNATURE, urllib.parse.quote(SECRET, safe="")]
UNCAUGHT = """
import os, sys
import pipelines.embed
def run(*words, **more):
    raise RuntimeError(f"GET http://me:hunter4passw0rd@host/?X-Amz-Signature=5ig0hunter5 " + os.environ["AWS_SESSION_TOKEN"])
pipelines.embed.run = run
from jobs.cli import main
sys.argv[0] = "facepipe"
main()
"""


class Refusing(BaseHTTPRequestHandler):
    """An S3 server that knows no key, and says what it was sent, as S3 does."""

    def do_GET(self) -> None:
        said = f"<Error><Code>SignatureDoesNotMatch</Code><Signed>{self.headers['Authorization']}</Signed></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def facepipe(*words: str | Path, code: str | None = None, cwd: Path, **more: str) -> tuple[int, str]:
    """(exit code, everything that a command says), with secrets in its environment."""
    environment = os.environ | {"AWS_ACCESS_KEY_ID": "AKIAHUNTERHUNTER", "AWS_SECRET_ACCESS_KEY": SECRET}
    environment |= {"AWS_SESSION_TOKEN": TOKEN, "AWS_REGION": "us-east-1", "FACEPIPE_RETRY_SECONDS": "0"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "FACEPIPE_CACHE": str(cwd / "cache"), **more}
    start = ["-m", "jobs.cli"] if code is None else ["-c", code]
    done = subprocess.run(
        [sys.executable, *start, *map(str, words)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def hunt(text: str | bytes, where: object) -> None:
    raw = text.encode() if isinstance(text, str) else text
    for secret in HUNTED:
        assert secret.encode() not in raw, (where, secret, text)


def test_no_failure_tells_a_secret(s3_server: str, refusing: str, drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "night.toml").write_text(f'gallery = "g"\n[s3]\nsecret_key = "{PASSWORD}"\n')
    dead = f"http://me:{PASSWORD}@127.0.0.1:9"
    settings = ["--runner", "inline", "--set", "detect.model=fake-detector", "--set", "embed.model=fake-embedder"]
    cases: list[tuple[int, str, list[str | Path], dict[str, Any]]] = [
        (1, "cannot list s3://absent", ["embed", "s3://absent/set", "g2", *settings], {"AWS_ENDPOINT_URL": s3_server}),
        (1, "cannot", ["info", "s3://faces/g", "--json"], {"AWS_ENDPOINT_URL": refusing}),
        (1, "command.failed", ["--log-format", "json", "--log-names", "embed", "s3://b/x", "g3", *settings],
         {"AWS_ENDPOINT_URL": dead}),
        (1, "RuntimeError", ["embed", drawings, "g4", *settings], {"code": UNCAUGHT}),
        (1, '"uncaught"', ["--log-format", "json", "embed", drawings, "g5", *settings], {"code": UNCAUGHT}),
        (2, "unknown key s3", ["nightly", "night.toml"], {}),
        (0, "images", ["--metrics-file", tmp_path / "m.prom", "embed", drawings, "done", "--json", *settings], {}),
    ]  # fmt: skip
    with ThreadPoolExecutor(3) as pool:
        ended = pool.map(lambda case: facepipe(*case[2], cwd=tmp_path, **case[3]), cases)
        for (code, message, words, _), (got, said) in zip(cases, ended, strict=True):
            assert (got, message in said) == (code, True), (words, said)
            hunt(said, words)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".toml"]
    assert {"m.prom", "last-embed.json"} <= {path.name for path in left}
    for path in left:
        hunt(path.read_bytes(), path)


@pytest.mark.parametrize(
    "tree",
    [
        {"source": {"uri": {"secret_key": PASSWORD}}},
        {"source": {"uri": {"a": [{"Password": [PASSWORD, PASSWORD]}]}}},
        {"source": {"uri": [f"s3://me:{PASSWORD}@b/x"]}},
        {"read": {"max_bytes": f"https://b/x?X-Amz-Signature={PASSWORD}"}},
        {"read": {"aws_secret_access_key": PASSWORD}},
        {"s3": {"secret_key": PASSWORD}},
    ],
)
def test_a_secret_in_a_config_is_not_repeated(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(EmbedConfig, tree)
    hunt(str(caught.value), tree)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_nor_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="takes section") as caught:
        parse_settings([f"s3.secret_key:{PASSWORD}"])
    hunt(str(caught.value), "--set")
    with pytest.raises(ConfigError) as caught:
        build(NightlyConfig, {"source": [{"uri": {"token": PASSWORD}}]})
    hunt(str(caught.value), "list of sections")
    with pytest.raises(ConfigError, match="got 'plenty'"):  # what is no secret is still shown
        build(EmbedConfig, {"read": {"max_bytes": "plenty"}})


def test_nor_by_the_parser_of_the_command_line() -> None:
    from typer.testing import CliRunner

    from jobs.cli import app

    url = f"s3://me:{PASSWORD}@faces/x"
    for words in (
        [url],
        ["info", "g", url],
        ["nightly", "n", "--format", url],
        ["evaluate", "pairs", url],
        ["index", url, "--threads", url],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2, done.output
        hunt(done.output, words)


def test_a_worker_that_fails_tells_no_secret(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'pipelines.runtime.runners.child' in sys.orig_argv:\n"
        "    from facepipe.stages.decode import Decode\n"
        "    def one(self, data):\n"
        "        raise RuntimeError('boom ' + os.environ['AWS_SESSION_TOKEN'] + ' http://me:hunter4passw0rd@host')\n"
        "    Decode.decode_image = one\n"
    )
    words = ["--set", "detect.model=fake-detector", "--set", "embed.model=fake-embedder", "--runner", "local"]
    more = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    code, said = facepipe("embed", drawings, "g", *words, "--workers", "1", cwd=tmp_path, **more)
    assert (code, "boom" in said) == (1, True), said
    hunt(said, "worker")
    for path in (tmp_path / "g").rglob("*"):
        if path.is_file():
            hunt(path.read_bytes(), path)


def test_urls_with_credentials_do_not_come_into_a_gallery(
    bucket: Any, tmp_path: Path, fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"s3://me:{PASSWORD}@faces/x", f"s3://{PASSWORD}@faces/x", f"az://me:{PASSWORD}@faces/x"):
        with pytest.raises(ConfigError, match="holds credentials") as caught:
            storage.split_url(url)
        hunt(str(caught.value), url)
    assert storage.split_url("abfs://container@account/x") == ("abfs://container@account", "x")
    with pytest.raises(FacepipeError, match="no http"):
        embed(f"https://host/a.jpg?X-Amz-Signature={SIGNATURE}", tmp_path / "g", fakes)
    with pytest.raises(StorageError) as refused:  # the client repeats the prefix with %3D for =
        embed(f"s3://absent/x?X-Amz-Signature={SIGNATURE}", tmp_path / "g", fakes)
    hunt(redact(str(refused.value)), "a signed prefix")
    names = [f"https://me:{PASSWORD}@host/a.jpg?X-Amz-Signature={SIGNATURE}", f"s3://me:{PASSWORD}@faces/b.jpg"]
    (tmp_path / "l.txt").write_text("\n".join([*names, "s3://faces/c.jpg", "s3://faces//d.jpg", "s3://faces/../e.jpg"]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("FACEPIPE_RETRY_SECONDS", "0")
    storage.open_bucket.cache_clear()
    assert embed(tmp_path / "l.txt", tmp_path / "g", fakes).statuses == {"read_error": 5}
    found = rows(tmp_path / "g")
    hunt(json.dumps(found, default=str), "rows")
    assert {"s3://faces/b.jpg", "s3://faces/c.jpg"} < {row["uri"] for row in found}


# ---------------------------------------------------------------- at rest: encrypted in a store

KEY = "arn:aws:kms:us-east-1:123456789012:key/0f1e2d3c"


@pytest.mark.parametrize("mode", ["aws:kms", "AES256", None])
def test_every_object_of_a_gallery_is_encrypted(
    mode: str | None,
    bucket: Any,
    drawings: Path,
    fakes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if mode:
        monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", mode)
    if mode == "aws:kms":
        monkeypatch.setenv("AWS_SSE_KMS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SSE_BUCKET_KEY_ENABLED", "true")
    found: dict[str, Any] = {}

    def look() -> None:
        for entry in bucket.list_objects_v2(Bucket="faces")["Contents"]:
            head = bucket.head_object(Bucket="faces", Key=entry["Key"])
            found[entry["Key"]] = head.get("ServerSideEncryption"), head.get("SSEKMSKeyId")

    embed(drawings, G, fakes)
    index.run(index.IndexConfig(), G)
    if mode == "aws:kms":  # the others go the same ways
        asked = {"graph": {"threshold": 0.4}}
        dedup.run(build(dedup.DedupConfig, asked), G)
        cluster.run(build(cluster.ClusterConfig, asked), G)
        look()
        erase.run(Selection(identities=("person1",)), G)
        large = tmp_path / "large"
        large.write_bytes(bytes(11 << 20))
        storage.write_file("s3://faces/large", str(large))  # goes in pieces
        kinds = (
            "faces/part-",
            "faces/_delta_log/",
            "index/manifest",
            "index/shard",
            "reports/dedup/",
            "reports/cluster/",
        )
        names = " ".join(found)
        look()
        assert all(f"team/gallery/{kind}" in names for kind in (*kinds, "runs/", ".lock")), names
        assert any(name.startswith("team/gallery/erased/") for name in found), "the receipt"
        assert "large" in found
    look()
    assert set(found.values()) == {(mode, KEY if mode == "aws:kms" else None)}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_SSE_KMS_KEY_ID": KEY}, "AWS_SERVER_SIDE_ENCRYPTION is not aws:kms"),
        ({"AWS_SSE_KMS_KEY_ID": KEY, "AWS_SERVER_SIDE_ENCRYPTION": "AES256"}, "is not aws:kms"),
        (
            {"AWS_SERVER_SIDE_ENCRYPTION": "sse-c", "AWS_SSE_CUSTOMER_KEY_BASE64": "a2tr" * 10 + "a2s="},
            "use aws:kms or AES256",
        ),
        ({"AWS_SERVER_SIDE_ENCRYPTION": "AES-256"}, "(?i)invalid encryption type"),
    ],
)
def test_encryption_that_would_not_happen_is_refused(
    variables: dict[str, str],
    message: str,
    bucket: Any,
    drawings: Path,
    fakes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FacepipeError, match=message):
        embed(drawings, G, fakes)
    listed = bucket.list_objects_v2(Bucket="faces").get("Contents", [])
    assert not [entry["Key"] for entry in listed if "faces/part" in entry["Key"] or "_delta_log" in entry["Key"]]
    assert table_access.get_delta_options("/a/folder") is None, "a gallery on a disk does not ask"
    with pytest.raises(Exception, match=message):
        open_table(f"{G}/faces")


# ---------------------------------------------------------------- at rest: on a disk


@pytest.fixture
def umask() -> Iterator[Any]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "open_to_others"), [(0o077, 0), (0o022, 0o055)])
def test_a_gallery_is_as_open_as_the_umask_lets_it_be(
    mask: int, open_to_others: int, umask: Any, drawings: Path, fakes: dict[str, Any], tmp_path: Path
) -> None:
    umask(mask)
    place = tmp_path / "g"
    embed(drawings, place, fakes, runner="local", workers=1)
    index.run(index.IndexConfig(), str(place))
    dedup.run(build(dedup.DedupConfig, {"graph": {"threshold": 0.4}}), str(place))
    for path in (place, *place.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not mode & ~0o700 & ~open_to_others, (path, oct(mode))
        assert path.is_dir() or not mode & 0o111, path


def test_copies_of_a_remote_gallery_are_private(umask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    umask(0)
    monkeypatch.setenv("FACEPIPE_CACHE", str(tmp_path / "cache"))
    place = Path(open_store(G, "reports/dedup").folder)
    held = place.parents[1]
    assert stat.S_IMODE(held.stat().st_mode) == stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    held.chmod(0o777)
    open_store(G, "index")
    assert stat.S_IMODE(held.stat().st_mode) == 0o700
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: held.stat().st_uid + 1)
        with pytest.raises(StorageError, match="not a folder of yours"):
            open_store(G, "index")
    held.rename(tmp_path / "elsewhere")
    held.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="not a folder of yours"):
        open_store(G, "index")


@pytest.mark.parametrize("name", ["../../x", "/etc/hostname", "a/../../../x", ".", ""])
def test_names_in_a_manifest_do_not_leave_the_copy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEPIPE_CACHE", str(tmp_path / "cache"))
    store = open_store(G, "index")
    with pytest.raises(StorageError, match="names no file"):
        store.fetch(name, 1, "")
    with pytest.raises(StorageError, match="names no file"):
        store.upload([name])


def test_keys_in_a_bucket_do_not_leave_the_copy(bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket="faces", Key="team/gallery/reports/dedup/../../../../../x", Body=b"x")
    store = open_store(G, "reports/dedup")
    with pytest.raises(StorageError):
        store.pull()
    assert not list(tmp_path.rglob("x"))


def test_temporary_tables_hold_hashes_and_no_name(tmp_path: Path) -> None:
    table = HashTable(1, folder=str(tmp_path))
    table.add(np.array([hash64("/photos/Jane Doe/1.jpg")], np.uint64), np.array([[7]], np.uint64))
    assert list(tmp_path.iterdir()) == [], "it shows in no listing"
    with open(f"/proc/self/fd/{table._file.fileno()}", "rb") as file:
        assert b"Jane" not in file.read()
    assert stat.S_IMODE(os.fstat(table._file.fileno()).st_mode) == 0o600
    table.close()


# ---------------------------------------------------------------- limits


def test_the_limits_in_the_docs_are_those_of_the_code() -> None:
    said = {name: int(value.replace(",", "")) for name, value in re.findall(r"^\| `([\w.]+)` \| ([\d,]+) ", DOCS, re.M)}
    assert said == {
        "read.max_bytes": Read().max_bytes,
        "decode.max_pixels": Decode().max_pixels,
        "decode.max_whole_pixels": Decode().max_whole_pixels,
        "decode.max_scans": Decode().max_scans,
        "OPENCV_IO_MAX_IMAGE_PIXELS": 1 << 28,
        "header._MAX_SEGMENTS": header._MAX_SEGMENTS,
        "tar._MAX_HEADER_BYTES": tar._MAX_HEADER_BYTES,
        "tar._MAX_LABEL_BYTES": tar._MAX_LABEL_BYTES,
        "tar._MAX_NAME": tar._MAX_NAME,
        "list_file._MAX_LINE": list_file._MAX_LINE,
    }
    assert os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] == str(1 << 28)


def test_what_is_over_a_limit_is_a_row(tmp_path: Path, fakes: dict[str, Any]) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), draw(1))
    for section in ({"read": {"max_bytes": 99}}, {"decode": {"max_pixels": 99}}):
        place = tmp_path / f"g-{next(iter(section))}"
        embed(tmp_path / "a.png", place, fakes, section)
        assert [row["status"] for row in rows(place)] == ["too_large"]
        assert rows(place)[0]["error"].endswith("the limit is 99")
