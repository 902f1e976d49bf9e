"""launch/gke.yaml: a valid job, whose rules do with exit codes what the table says, run here."""

import contextlib
import copy
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from launch_hosts import EXIT_CODES, LAUNCH, Machine, other

SERVICE, JOB = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
SPEC = JOB["spec"]
POD = SPEC["template"]["spec"]
CONTAINER = POD["containers"][0]
VERSIONS = ("1.31", "1.34", "1.37")


@pytest.mark.parametrize("version", VERSIONS)
def test_schema(version):
    for document in (SERVICE, JOB):
        kubernetes_validate.validate(document, version, strict=True)


def wrong(*path, value=None, name=None):
    """The job with one entry changed, or under another name."""
    job = copy.deepcopy(JOB)
    place = job
    for step in path[:-1]:
        place = place[step]
    if name is None:
        place[path[-1]] = value
    else:
        place[name] = place.pop(path[-1])
    return job


@pytest.mark.parametrize(
    "job",
    [
        wrong("spec", "podFailurePolicy", name="podFailurePolicies"),
        wrong("spec", "podFailurePolicy", "rules", 0, "action", name="act"),
        wrong("spec", "podFailurePolicy", "rules", 0, "onPodConditions", value=[{"type": "X"}]),
        wrong("spec", "completions", value="two"),
        wrong("spec", "template", "spec", "volumes", 1, "emptyDir", "sizeLimit", name="size"),
        wrong(
            "spec", "template", "spec", "containers", 0, "volumeMounts", 0, "mountPath", name="x"
        ),
    ],
    ids=["key", "rule", "condition", "number", "volume", "container"],
)
def test_schema_refuses(job):
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def action(code: int, disrupted: bool = False) -> str:
    """What the job does with a failed pod: the first rule that fits; none: it counts."""
    for rule in SPEC["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is not None:
            assert codes["operator"] == "In"
            assert codes["containerName"] == CONTAINER["name"]
            fits = code in codes["values"]
        else:
            (condition,) = rule["onPodConditions"]
            assert condition == {"type": "DisruptionTarget", "status": "True"}
            fits = disrupted
        if fits:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize(("code", "again"), [item for item in EXIT_CODES.items() if item[0]])
def test_rules_of_exit_codes(code, again):
    assert (action(code) != "FailJob") == again
    # What a signal ended counts: a pod that dies each time must not come back for ever.
    assert (action(code) == "Count") == (code > 130)
    assert action(code, disrupted=True) == "Ignore"


class Cluster(Machine):
    """Runs the pods of the job as processes, and makes them anew by its rules."""

    def __init__(self, folder):
        super().__init__(folder)
        venv = self.checkout / ".venv" / "bin"
        venv.mkdir(parents=True)
        shutil.copy(self.python, venv / "python")
        del self.environment["PYTHON"]

    def pod(self, index: int) -> subprocess.Popen:
        words = [*CONTAINER["command"], *CONTAINER["args"]]
        words = [w.replace("$(JOB_COMPLETION_INDEX)", str(index)) for w in words]
        words = [w.replace("/protoclip_jax/", f"{self.checkout}/") for w in words]
        return self.start(*words, folder=Path("/"))

    def job(self) -> tuple[str, int]:
        """Complete or Failed, and how many failures counted."""
        running = {index: self.pod(index) for index in range(SPEC["completions"])}
        failures = 0
        deadline = time.monotonic() + 30
        while running:
            assert time.monotonic() < deadline, "the job does not end"
            time.sleep(0.01)
            for index, pod in list(running.items()):
                code = pod.poll()
                if code is None:
                    continue
                pod.communicate()
                # bash has become the trainer: what a signal ended is 128 + its number there.
                code = 128 - code if code < 0 else code
                if code == 0:
                    del running[index]
                    if SPEC["successPolicy"]["rules"] == [{"succeededIndexes": str(index)}]:
                        return self.ended(running, "Complete", failures)
                    continue
                what = action(code)
                failures += what == "Count"
                if what == "FailJob" or failures > SPEC["backoffLimit"]:
                    return self.ended(running, "Failed", failures)
                running[index] = self.pod(index)
        return "Complete", failures

    @staticmethod
    def ended(running, result: str, failures: int) -> tuple[str, int]:
        for pod in running.values():
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(pod.pid, signal.SIGKILL)
            pod.communicate()
        return result, failures


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize(("code", "again"), EXIT_CODES.items())
def test_exit_codes(cluster, code, again):
    # Process 0 is not done before the other one has failed.
    cluster.plans(f"{other(code)}, after started-1-2 0", f"{code}, 0")
    result, failures = cluster.job()
    assert result == ("Complete" if again or code == 0 else "Failed")
    assert failures == (again and code > 130)
    if again:
        assert cluster.starts(0) == 2


def test_deaths_are_bounded(cluster):
    cluster.plans(*([", ".join(["137"] * 40)] * 2))
    assert cluster.job() == ("Failed", SPEC["backoffLimit"] + 1)


def test_other_process_lost_at_the_end_does_not_keep_the_job(cluster):
    """Process 0 is done, and would not come back to meet the one that is made anew."""
    cluster.plans("0", "deaf")
    assert cluster.job() == ("Complete", 0)


def test_what_a_pod_is_told(cluster):
    cluster.job()
    folder, *arguments = cluster.told(0)
    assert folder == str(cluster.checkout)
    assert arguments[-1] == "--process_id=0"
    assert f"--num_processes={SPEC['completions']}" in arguments
    assert os.path.basename(CONTAINER["command"][1]) == "worker.sh"


def test_pods_meet_again():
    """Each under its name, never two of one number, and found before it is ready."""
    name = JOB["metadata"]["name"]
    service = SERVICE["metadata"]["name"]
    assert POD["subdomain"] == service
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert any(a.startswith(f"--coordinator={name}-0.{service}:") for a in CONTAINER["args"])
    assert SPEC["completionMode"] == "Indexed"
    assert SPEC["parallelism"] == SPEC["completions"]
    assert SPEC["podReplacementPolicy"] == "Failed"
    assert "backoffLimitPerIndex" not in SPEC
    assert POD["restartPolicy"] == "Never"


def quantity(text: str) -> float:
    units = {"Gi": 2**30, "Mi": 2**20}
    return float(text[:-2]) * units[text[-2:]] if text[-2:] in units else float(text)


def test_memory_of_a_pod():
    """/dev/shm has room for what the recipe's workers send, and the pod for that and the rest."""
    from protoclip_jax.recipe import defaults, load_recipe, resolve

    recipe = load_recipe(str(LAUNCH.parent / "configs" / "cc3m.py"))
    assert any(a == "--config=configs/cc3m.py" for a in CONTAINER["args"])
    assert set(recipe) <= set(defaults())
    config = resolve(recipe, 16)
    (shared,) = [v for v in POD["volumes"] if "emptyDir" in v]
    assert shared["emptyDir"]["medium"] == "Memory"
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts[shared["name"]] == "/dev/shm"
    room = quantity(shared["emptyDir"]["sizeLimit"])
    images = config.optimizer.batch // SPEC["completions"]
    assert config.data.workers * 6 * images * 224**2 * 3 <= room
    resources = CONTAINER["resources"]
    memory = quantity(resources["requests"]["memory"])
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    needed = room + (config.data.keep_gigabytes + config.data.workers + 16) * 1e9
    assert needed <= memory
    assert quantity(resources["requests"]["cpu"]) >= config.data.workers + 8
