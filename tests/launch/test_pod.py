"""Manifests of pods: their real schemas hold, what they run on a host is right, and nothing wrong is written."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import pod_jobset, pod_slurm
from launch.app import EXIT_INTERRUPTED
from launch.pod_topology import parse_topology
from tml.plan.chips import CHIPS
from tml.xla_flags import XLA_FLAGS, Platform, flags_environment, xla_flags

ROOT = Path(__file__).parents[2]
SKYPILOT = json.loads(Path(__file__).with_name("skypilot.schema.json").read_text())
SBATCH_OPTIONS = {
    **dict.fromkeys(("job-name", "partition", "account", "output", "chdir"), r".+"),
    "time": r"(\d+-)?\d+(:\d+){0,2}",
    "mem": r"\d+[KMGT]?",
    **dict.fromkeys(("nodes", "ntasks-per-node", "gpus-per-node"), r"[1-9]\d*"),
    **dict.fromkeys(("exclusive", "requeue"), r""),
    "open-mode": r"append|truncate",
    "signal": r"(B:)?(USR1|TERM|\d+)(@\d{1,5})?",
}
"""Options of sbatch and the form of their values: sbatch(1) of Slurm 22.05, section OPTIONS."""

GKE = ("--target=gke", "--topology=v5p:2x2x2", "--image=registry/tml:1", "--claim=shared")
SLURM = ("--target=slurm", "--topology=h100:1x2x8", "--time_limit=1-00:00:00", "--account=lab", "--partition=gpu")
SKY = ("--target=skypilot", "--topology=h200:1x2x8", "--bucket=gs://bucket")


def mesh(replica: int, fsdp: int) -> tuple[str, ...]:
    sizes = {"mesh.replica": replica, "mesh.fsdp": fsdp, "data.rows_per_batch": 2 * replica * fsdp}
    return tuple(f"--config.{name}={value}" for name, value in sizes.items())


@pytest.fixture(scope="module")
def app() -> Iterator[subprocess.Popen[str]]:
    """The app as a server, so that its imports are paid once."""
    program = [sys.executable, str(Path(__file__).with_name("pod_program.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(program, cwd=ROOT, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def pod(app: subprocess.Popen[str], out: Path, *flags: str) -> tuple[int, str]:
    """Runs the app with flags; returns its exit code and its errors."""
    assert app.stdin is not None
    assert app.stdout is not None
    print(json.dumps(["launch.pod", "--config=experiments/quickstart.py", f"--out={out}", *flags]), file=app.stdin)
    app.stdin.flush()
    code, errors = json.loads(app.stdout.readline())
    return code, errors


def written(app: subprocess.Popen[str], out: Path, *flags: str) -> str:
    code, errors = pod(app, out, *flags)
    assert code == 0, errors
    (file,) = out.iterdir()
    return file.read_text()


def test_a_jobset_of_two_slices_is_one_of_the_api(app, tmp_path: Path) -> None:
    text = written(app, tmp_path, *GKE, "--num_slices=2", "--queue=multislice-queue", *mesh(2, 8))
    manifest = yaml.safe_load(text)
    # The models of the API drop what they do not know, so only a manifest without mistakes comes back whole.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest

    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["completions"], job["parallelism"]) == (2, 2, 2)
    selector = job["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert selector["cloud.google.com/gke-tpu-topology"] == "2x2x2"
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert given["TML_COORDINATOR_ADDRESS"] == "quickstart-slice-0-0.quickstart:8476"
    assert given["TML_NUM_PROCESSES"] == "4"
    assert given["LIBTPU_INIT_ARGS"] == flags_environment(Platform.TPU, 2, "v5p")["LIBTPU_INIT_ARGS"]
    assert given["MEGASCALE_NUM_SLICES"] == "2"

    def number_of(slice_id: int, host: int) -> str:
        environment = {**os.environ, "TML_SLICE_ID": str(slice_id), "JOB_COMPLETION_INDEX": str(host)}
        command = [*container["command"][:4], "bash", "-c", "echo $TML_PROCESS_ID"]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

    assert [number_of(*place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))] == ["0", "1", "2", "3"]


def test_a_mistake_does_not_come_back_from_the_api(app, tmp_path: Path) -> None:
    manifest = yaml.safe_load(written(app, tmp_path, *GKE, *mesh(1, 8)))
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest


def test_a_batch_script_has_options_that_sbatch_knows(app, tmp_path: Path) -> None:
    text = written(app, tmp_path, *SLURM, *mesh(1, 16))
    head = text.partition("\nset -euo pipefail")[0].strip().splitlines()
    assert head[0] == "#!/usr/bin/env bash"
    for line in head[1:]:
        name, value = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line).groups()
        assert re.fullmatch(SBATCH_OPTIONS[name], value or ""), line
    assert "#SBATCH --nodes=2" in head
    assert "#SBATCH --gpus-per-node=8" in head
    assert "#SBATCH --mem=0" in head, "the hosts are ours alone, with all of their memory"
    assert text.count("#SBATCH") == len(head) - 1


FAKES = {
    # Two tasks at once, which each write what they were given; the highest exit code of all, as srun(1) says.
    "srun": """
while [[ $1 == --* ]]; do echo "$1" >> srun.flags; shift; done
for i in 0 1; do SLURM_PROCID=$i "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || { c=$?; (( c > code )) && code=$c; }; done
exit "$code"
""",
    "scontrol": """
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$@" >> requeued; fi
""",
    "scancel": """
echo "$@" >> cancelled
for file in task.*.pid; do kill -TERM "$(cat "$file")"; done
""",
    "train": """
echo "$TML_PROCESS_ID/$TML_NUM_PROCESSES at $TML_COORDINATOR_ADDRESS: $*" > "task.$TML_PROCESS_ID.given"
if [[ $END == term:* ]]; then
  trap 'kill "$!"; exit "${END#term:}"' TERM
  sleep 60 & echo $$ > "task.$TML_PROCESS_ID.pid"
  if [[ $TML_PROCESS_ID == 1 ]]; then
    until [[ -s task.0.pid ]]; do sleep 0.05; done
    kill -USR1 "$BATCH"
  fi
  wait
fi
exit "$END"
""",
}


@pytest.mark.parametrize(
    ("end", "failures", "code", "requeued"),
    [
        ("0", 0, 0, False),
        ("2", 0, 2, False),
        ("75", 0, 75, False),
        ("1", 0, 1, True),
        ("1", 2, 1, True),
        ("1", 3, 1, False),
    ],
)
def test_a_batch_script_runs_every_task_and_requeues_what_may_succeed(
    tmp_path: Path, end: str, failures: int, code: int, requeued: bool
) -> None:
    assert run_batch(tmp_path, end, failures) == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "12.failures").read_text().strip() == str(failures + 1)
    for task in (0, 1):
        given = (tmp_path / f"task.{task}.given").read_text()
        assert given.startswith(f"{task}/2 at node7:8476: -m launch.train --config={tmp_path}/code/experiments/")
        assert "--config.mesh.fsdp=16" in given


@pytest.mark.parametrize(
    ("code", "failures", "counted", "requeued"),
    [(EXIT_INTERRUPTED, 3, 3, True), (0, 1, 1, False), (2, 1, 1, False), (1, 1, 2, True), (1, 3, 3, False)],
)
def test_a_batch_script_is_warned_before_its_time_is_up_and_requeues_what_is_not_done(
    tmp_path: Path, code: int, failures: int, counted: int, requeued: bool
) -> None:
    assert run_batch(tmp_path, f"term:{code}", failures) == code
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 12\n"
    assert (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "12.failures").read_text().strip() == str(counted)


def test_a_time_limit_is_read_as_sbatch_reads_it() -> None:
    limits = {"90": 5_400, "90:30": 5_430, "1:30:05": 5_405, "2-3": 183_600, "2-3:04": 183_840, "0-3:04:05": 11_045}
    assert {text: pod_slurm.parse_time_limit(text) for text in limits} == limits


def run_batch(folder: Path, end: str, failures: int) -> int:
    """Runs a rendered script among programs that stand for Slurm's and for the training; returns its exit code."""
    binaries = folder / "bin"
    binaries.mkdir()
    for name, body in FAKES.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body.lstrip()}")
        (binaries / name).chmod(stat.S_IRWXU)
    topology = parse_topology("h100:1x2x8", 1)
    job = pod_job(topology, folder, python=str(binaries / "train"))
    (folder / "job.sbatch").write_text(pod_slurm.sbatch_text(job, "1:00:00", "", ""))
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "END": end}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": "7"}
    if failures:
        (folder / "12.failures").write_text(str(failures))
    start = ["bash", "-c", "export BATCH=$$; exec bash job.sbatch"]
    return subprocess.run(start, cwd=folder, env=environment, timeout=30, capture_output=True).returncode


def pod_job(topology, folder: Path, python: str):
    from launch.pod_job import PodJob, settings_for, train_command

    overrides = ["--config=experiments/quickstart.py", *mesh(1, 16)]
    return PodJob(
        name="quickstart",
        topology=topology,
        command=train_command(overrides, folder / "code", python, "runs/quickstart", 60),
        settings=settings_for(topology, folder, folder / "code", "abc"),
        shared=folder,
        code=folder / "code",
        max_restarts=3,
        grace_s=60,
    )


@pytest.mark.parametrize(
    ("topology", "num_devices", "accelerators", "num_nodes", "num_processes"),
    [
        ("h200:1x2x8", 16, "H200:8", 2, 2),
        ("v5p:2x2x2", 8, "tpu-v5p-16:1", 1, 2),
        ("v6e:2x4", 8, "tpu-v6e-8:1", 1, 1),
        ("v5e:2x4", 8, "tpu-v5litepod-8:1", 1, 1),
        ("v6e:4x4", 16, "tpu-v6e-16:1", 1, 4),
    ],
)
def test_a_task_of_skypilot_is_one_of_its_schema(
    app, tmp_path: Path, topology: str, num_devices: int, accelerators: str, num_nodes: int, num_processes: int
) -> None:
    flags = ("--target=skypilot", f"--topology={topology}", "--bucket=gs://bucket", *mesh(1, num_devices))
    task = yaml.safe_load(written(app, tmp_path / "out", *flags))
    jsonschema.validate(task, SKYPILOT["task"])
    jsonschema.validate(task["resources"], SKYPILOT["resources"])
    jsonschema.validate(task["file_mounts"]["/mnt/tml"], SKYPILOT["storage"])
    assert task["file_mounts"]["/opt/tml"] == "."
    assert task["resources"]["accelerators"] == accelerators
    assert task["num_nodes"] == num_nodes
    # A small slice of v5e or v6e is one host here, and two of GKE's.
    assert task["envs"]["TML_NUM_PROCESSES"] == str(num_processes)

    given = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NODE_RANK": "1"}
    script = task["run"].replace("cd /mnt/tml", f"cd {tmp_path}").replace("exec /opt/tml/.venv/bin/python", "echo")
    script += 'echo "$TML_PROCESS_ID at $TML_COORDINATOR_ADDRESS"\n'
    script = script.replace("exec ", "")
    done = subprocess.run(["bash", "-c", script], env={**os.environ, **given}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1 at 10.0.0.5:8476", done.stderr
    assert shlex.split(done.stdout.splitlines()[0])[:3] == [
        "-m",
        "launch.train",
        "--config=/opt/tml/experiments/quickstart.py",
    ]


def test_a_task_of_skypilot_installs_with_a_python_that_the_package_takes(app, tmp_path: Path) -> None:
    setup = yaml.safe_load(written(app, tmp_path / "out", *SKY, *mesh(1, 16)))["setup"]
    code, uv, pip = (tmp_path / name for name in ("code", ".local/bin/uv", "pip"))
    # Programs that stand for SkyPilot's uv and for the pip of the environment that it makes note how they are called.
    for program, body in ((uv, f"mkdir -p .venv/bin; cp {pip} .venv/bin"), (pip, "")):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/usr/bin/env bash\necho "${{0##*/}} $*" >> called\n{body}\n')
        program.chmod(stat.S_IRWXU)
    code.mkdir()
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", setup.replace("/opt/tml", str(code))], env=environment, check=True)
    (least,) = re.findall(r'python_requires=">=(.*)"', (ROOT / "setup.py").read_text())
    assert (code / "called").read_text().splitlines() == [
        f"uv venv --seed --allow-existing --python {least} .venv",
        "pip install --quiet --editable .[gpu,tiktoken]",
    ]
    extras = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert {"gpu", "tpu", "tiktoken"} <= set(extras)


@pytest.mark.parametrize(
    ("name", "hosts"), [("v5p:2x2x1", 1), ("v5p:4x8x8", 64), ("tpu7x:4x4x12", 48), ("v6e:2x4", 2), ("v5e:16x16", 64)]
)
def test_gke_has_node_pools_of_these_shapes(name: str, hosts: int) -> None:
    topology = parse_topology(name, 1)
    pod_jobset.check_shape(topology)
    assert topology.hosts_per_slice == hosts


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5p:8x8x4", r"no node pool of v5p:8x8x4: sizes ascend; set --topology=v5p:4x8x8"),
        ("v6e:16x8", r"set --topology=v6e:8x16"),
        ("v5p:2x2x3", r"no node pool of v5p:2x2x3; there are 2x2x1, 2x2x2, 2x2x4, 2x4x4, and ascending multiples of 4"),
        ("tpu7x:2x4x8", r"no node pool of tpu7x:2x4x8; there are"),
        ("v6e:4x16", r"there are 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16$"),
    ],
)
def test_gke_has_no_node_pools_of_other_shapes(topology: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pod_jobset.check_shape(parse_topology(topology, 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (*GKE, "--config.model.row_parts=1"),
            r"is for 1 devices, but 1 slice\(s\) of v5p:2x2x2 have 8 devices; the nearest valid mesh of",
        ),
        ((*GKE, "--num_slices=2", *mesh(1, 16)), r"replica = 1 is not .* the 2 slices, .* {'replica': 2, 'fsdp': 8,"),
        ((*GKE, "--topology=tpu7x:2x2x1", *mesh(1, 4)), r"for 4 devices, but .* have 8 devices \(2 a chip\)"),
        ((*GKE, "--topology=v5p:8x8"), r"must give 3 sizes, chips along the axes of a slice, as in v5p:8x8x8"),
        ((*GKE, "--topology=v6:8x8"), r"unknown chip 'v6'; did you mean v6e"),
        ((*GKE, "--topology=v5p:1x1x1"), r"has 1 chips, which hosts of 4 do not fill; .* v5p:2x2x1"),
        ((*GKE, "--topology=v6e:1x4", *mesh(1, 4)), r"so the first two sizes must be even"),
        ((*SLURM, *mesh(1, 16), "--config.model.moe.backend=tpu"), r"runs on tpu, but the devices are gpu"),
        ((*GKE, "--topology=h100:1x2x8", *mesh(1, 16)), r"gke is for TPU slices; use --target=slurm"),
        ((*GKE[:-1],), r"--claim is missing"),
        ((*GKE, "--bucket=gs://b"), r"--bucket is for --target=skypilot, not gke"),
        ((*SLURM, "--topology=v6e:4x4", *mesh(1, 16)), r"slurm is for GPUs; use --target=gke"),
        ((*SKY, "--topology=tpu7x:2x2x1", *mesh(1, 8)), r"SkyPilot has no tpu7x; render it with --target=gke"),
        ((*SKY, "--topology=v6e:2x2", "--num_slices=2", *mesh(2, 4)), r"one TPU slice a task, not 2"),
        ((*GKE, "--topology=v6e:4x2", *mesh(1, 8)), r"no node pool of v6e:4x2: .* --topology=v6e:2x4"),
        ((*SKY, "--bucket=s3://b", *mesh(1, 16)), r"--bucket=s3://b must be gs://NAME: .* metrics\.jsonl"),
        ((*SLURM, "--time_limit=20", *mesh(1, 16)), r"is 1200 s, and must exceed .* 300 \+ 900 s"),
        ((*SLURM, "--time_limit=1:00:00:00", *mesh(1, 16)), r"1:00:00:00 is no time of sbatch's"),
        ((*SLURM, "--grace_s=70000", *mesh(1, 16)), r"70000 is more than the 65535 s"),
        ((*SLURM, "--grace_s=0", *mesh(1, 16)), r"grace_s"),
        ((*SLURM, "--max_restarts=-1", *mesh(1, 16)), r"max_restarts"),
        ((*GKE, *mesh(1, 8), "--shared=mnt"), r"--shared='mnt' must be an absolute path"),
        ((*GKE, *mesh(1, 8), "--code=code"), r"--code='code' must be an absolute path"),
        ((*GKE, *mesh(1, 8), "--claim=UPPER"), r"--claim='UPPER' must be a name of Kubernetes"),
        ((*GKE, *mesh(1, 8), "--image=a b"), r"--image='a b' must be a container image"),
        ((*SLURM, *mesh(1, 16), "--account=x\ny"), r"--account='x\\ny' must be a name without spaces"),
        ((*GKE, *mesh(1, 8), "--config.model.attention.backend=gpu"), r"are tpu; set it to 'tpu'$"),
        ((*GKE, *mesh(1, 8), "--config.name=2nd run"), r"'2nd run' cannot name a job"),
        ((*GKE, *mesh(1, 8), "--config.seed", "3"), r"write --config.seed=VALUE"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(app, tmp_path: Path, flags, message: str) -> None:
    found, errors = pod(app, tmp_path / "out", *flags)
    assert found == 2, errors
    (line,) = errors.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_says_something_else_is_kept(app, tmp_path: Path) -> None:
    text = written(app, tmp_path, *GKE, *mesh(1, 8))
    assert written(app, tmp_path, *GKE, *mesh(1, 8)) == text
    (file,) = tmp_path.iterdir()
    file.write_text(text + "# by hand\n")
    code, errors = pod(app, tmp_path, *GKE, *mesh(1, 8))
    assert code == 1
    assert "jobset.yaml is there and says something else" in errors
    assert file.read_text() == text + "# by hand\n"
    assert written(app, tmp_path, *GKE, *mesh(1, 8), "--overwrite") == text


def test_every_flag_of_xla_exists_and_has_a_reason() -> None:
    """XLA ends a program at a flag that it does not know; libtpu's are in the slow test."""
    assert all(len(flag.reason) > 20 for flag in XLA_FLAGS)
    for chip in CHIPS:
        names = [flag.name for flag in xla_flags(CHIPS[chip].platform, 2, chip)]
        assert len(set(names)) == len(names), chip
    environment = {**os.environ, **flags_environment(Platform.CUDA, num_slices=2, chip="h100"), "JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", "import jax; print(jax.devices())"]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    environment["XLA_FLAGS"] += " --xla_gpu_no_such_flag=1"
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=120)
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=1" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v5e", "v6e"])
def test_every_flag_of_libtpu_exists(chip: str) -> None:
    """Needs libtpu, which `pip install -e '.[tpu]'` brings, but no TPU."""
    code = "from jax.experimental import topologies as t; "
    code += "print(t.get_topology_desc('v5p:2x2x1', 'tpu').devices[0].device_kind)"
    fixed = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, **fixed, **flags_environment(Platform.TPU, num_slices=2, chip=chip)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "TPU v5" in done.stdout
