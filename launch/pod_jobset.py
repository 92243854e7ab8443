"""A JobSet for TPU slices on GKE, in a cluster of one's own or of XPK's making: one Job a slice, one pod a host."""

import shlex
from typing import Any

from launch.app import EXIT_INTERRUPTED
from launch.pod_job import COORDINATOR_PORT, PodJob, manifest_text
from launch.pod_topology import Topology

SLICE, CONTAINER, VOLUME = "slice", "train", "shared"
TPU_PORTS = (8471, 8431)
"""The TPU runtime's own traffic and its metrics (cloud.google.com/kubernetes-engine/docs/how-to/tpus)."""

FLAT_SHAPES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Node pools of v5e and v6e that hosts of four chips fill."""
SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Node pools of v5p and tpu7x that are less than a cube of 4 x 4 x 4; larger ones are made of such cubes.

Both: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and XPK's table of systems."""
CUBE = 4


def check_shape(topology: Topology) -> None:
    """Checks that GKE has node pools of the slice's shape.

    Raises:
        ValueError: with the shape in order if that is one, else with those that there are.
    """
    chip, shape = topology.chip.name, topology.shape
    ascending = tuple(sorted(shape))
    if _is_pool(shape):
        return
    wrong = f"GKE has no node pool of {chip}:{_written(shape)}"
    if _is_pool(ascending):
        raise ValueError(f"{wrong}: sizes ascend; set --topology={chip}:{_written(ascending)}")
    is_flat = len(shape) == 2
    known = ", ".join(_written(each) for each in (FLAT_SHAPES if is_flat else SMALL_SHAPES))
    raise ValueError(f"{wrong}; there are {known}" + ("" if is_flat else f", and ascending multiples of {CUBE}"))


def _is_pool(shape: tuple[int, ...]) -> bool:
    are_cubes = len(shape) == 3 and all(size % CUBE == 0 for size in shape)
    return shape in (*FLAT_SHAPES, *SMALL_SHAPES) or (are_cubes and list(shape) == sorted(shape))


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def jobset(job: PodJob, image: str, claim: str, queue: str) -> dict[str, Any]:
    """The manifest, as the JobSet v1alpha2 API has it.

    A pod that ends with the exit code of an orderly interruption, or that Kubernetes evicts, restarts
    all slices without counting; any other failure counts against `max_restarts`. One pod never restarts
    alone: the others wait for it in a collective.

    Args:
        job: what runs.
        image: the container's, with the code.
        claim: a PersistentVolumeClaim that many nodes may write, mounted at `job.shared`.
        queue: the Kueue queue (XPK's clusters: multislice-queue); empty for none.

    Raises:
        ValueError: a slice of a shape that GKE has no node pool of.
    """
    check_shape(job.topology)
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    restarts = {
        "name": "savedOrEvicted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "labels": labels,
            # One slice is one node pool: no two Jobs share one, and no Job is spread over two.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": SLICE, "jobIndex": 0, "podIndex": 0},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [restarts]},
            "replicatedJobs": [
                {
                    "name": SLICE,
                    "replicas": job.topology.num_slices,
                    "template": {"spec": _slice(job, image, claim)},
                }
            ],
        },
    }


def jobset_text(job: PodJob, image: str, claim: str, queue: str) -> str:
    """The manifest as YAML."""
    return manifest_text(jobset(job, image, claim, queue))


def _slice(job: PodJob, image: str, claim: str) -> dict[str, Any]:
    """The Job of one slice: as many pods as hosts, numbered, which end together."""
    hosts = job.topology.hosts_per_slice
    saved = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_INTERRUPTED]}
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": saved},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(job, image, claim)},
    }


def _pod(job: PodJob, image: str, claim: str) -> dict[str, Any]:
    topology = job.topology
    several_slices = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if topology.num_slices > 1 else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": topology.machines.gke_name,
            "cloud.google.com/gke-tpu-topology": _written(topology.shape),
        },
        **several_slices,
        "containers": [
            {
                "name": CONTAINER,
                "image": image,
                "workingDir": str(job.shared),
                "command": ["bash", "-c", process_script(job), CONTAINER, *job.command],
                "env": _environment(job),
                "ports": [{"containerPort": port, "protocol": "TCP"} for port in (COORDINATOR_PORT, *TPU_PORTS)],
                "resources": {"limits": {"google.com/tpu": str(topology.chips_per_host)}},
                "volumeMounts": [{"name": VOLUME, "mountPath": str(job.shared)}],
            }
        ],
        "volumes": [{"name": VOLUME, "persistentVolumeClaim": {"claimName": claim}}],
    }


def process_script(job: PodJob) -> str:
    """Numbers the process over all slices, then becomes the command, which so gets the signals of the pod."""
    number = f"$((TML_SLICE_ID * {job.topology.hosts_per_slice} + JOB_COMPLETION_INDEX))"
    return f'export TML_PROCESS_ID={number}; exec "$@"'


def _environment(job: PodJob) -> list[dict[str, Any]]:
    """Settings, the coordinator's address, and the number of this slice, which only the pod knows."""
    host = f"{job.name}-{SLICE}-0-0.{job.name}"
    slice_id = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
    values = {**job.environment, "TML_COORDINATOR_ADDRESS": f"{host}:{COORDINATOR_PORT}"}
    entries: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    entries.append({"name": "TML_SLICE_ID", "valueFrom": slice_id})
    if job.topology.num_slices > 1:
        entries += [
            {"name": "MEGASCALE_NUM_SLICES", "value": str(job.topology.num_slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": slice_id},
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": host},
        ]
    return entries


def submit_command(file: str) -> str:
    """How the manifest is handed in."""
    return shlex.join(["kubectl", "apply", "--filename", file])
