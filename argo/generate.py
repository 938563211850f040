"""Writes argo/templates/rpl-STAGE.yaml: one WorkflowTemplate per stage of `rpl.rounds`, and those around the stages.

    python argo/generate.py          (make argo)

The loop itself, `templates/rpl-run.yaml`, is written by hand; a test compares it with `rpl.rounds`, and these with what
this file writes. Each template is complete in itself, so that one stage can be submitted alone:

    argo submit -n rpl --from workflowtemplate/rpl-learn -p run=first -p round=1
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rpl.rounds import STAGES

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Size:
    """What a pod asks for, and what it may take. One that needs more memory is killed, and not tried again."""

    cpu: str = "250m"
    memory: str = "512Mi"
    most_cpu: str = "4"
    most_memory: str = "4Gi"


SIZES = {
    "crop": Size(memory="1Gi"),
    "encode": Size(cpu="500m", memory="2Gi", most_cpu="16", most_memory="16Gi"),
    "index": Size(memory="1Gi", most_memory="16Gi"),
    "learn": Size(cpu="500m", memory="2Gi", most_cpu="16", most_memory="16Gi"),
    "embed": Size(cpu="500m", memory="2Gi", most_memory="8Gi"),
    "retrieve": Size(memory="1Gi", most_memory="16Gi"),
    "download": Size(cpu="500m", memory="1Gi"),
}
"""Where the default does not do. The chart's value `resources` replaces them."""


@dataclass(frozen=True)
class Pod:
    """One kind of pod: what it runs and on what."""

    name: str
    title: str
    image: Literal["light", "clip"]
    gpu: bool
    inputs: dict[str, str | None]
    """Parameters with their defaults; None: must be given."""
    args: list[str]
    outputs: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


RUN = "{{workflow.parameters.runs}}/{{workflow.parameters.run}}"
OUTPUTS = "/tmp/outputs"  # noqa: S108 (inside the pod)


def pods() -> list[Pod]:
    around = [
        Pod(
            "start", "Check the configuration and freeze it into the run", "light", False,
            {"config": "", "max-rounds": "", "shards": "", "after": ""},
            ["--config={{inputs.parameters.config}}", "--max-rounds={{inputs.parameters.max-rounds}}",
             "--shards={{inputs.parameters.shards}}", "--after={{inputs.parameters.after}}"],
            ("crop-shards", "download-shards"),
        ),
        Pod(
            "decide", "Decide whether another round follows", "light", False, {"round": None},
            ["--round={{inputs.parameters.round}}"], ("go-on",),
        ),
        Pod(
            "finish", "Publish how the run ended", "light", False,
            {"status": None, "seconds": "0", "failures": "[]"},
            ["--status={{inputs.parameters.status}}", "--seconds={{inputs.parameters.seconds}}"],
            env=(("RPL_FAILURES", "{{inputs.parameters.failures}}"),),
        ),
    ]  # fmt: skip
    stages = []
    for stage in STAGES.values():
        inputs: dict[str, str | None] = {"round": "once"} if stage.in_round is not None else {}
        if stage.shards is not None:
            inputs["shard"] = "all"
        args = [f"--{name}={{{{inputs.parameters.{name}}}}}" for name in inputs]
        # A GPU each for as many ranks; the other stages use one.
        env = (("RPL_RANKS", "{{workflow.parameters.gpus}}"),) if stage.name == "learn" else ()
        stages.append(Pod(stage.name, stage.title, stage.image, stage.gpu, inputs, args, env=env))
    return around + stages


def template(pod: Pod) -> str:
    """The YAML of one WorkflowTemplate."""
    size = SIZES.get(pod.name, Size())
    args = ["-m", f"jobs.{pod.name}", f"--run={RUN}", *pod.args, *([f"--outputs={OUTPUTS}"] if pod.outputs else [])]
    inputs = "".join(
        f"          - name: {name}\n" + ("" if value is None else f"            value: {json.dumps(value)}\n")
        for name, value in pod.inputs.items()
    )
    outputs = "".join(
        f"          - name: {name}\n            valueFrom: {{path: {OUTPUTS}/{name}}}\n" for name in pod.outputs
    )
    env = "".join(f"          - {{name: {name}, value: {json.dumps(value)}}}\n" for name, value in pod.env)
    return TEMPLATE.format(
        name=pod.name, title=pod.title, image=pod.image,
        arguments=_arguments(pod), args=json.dumps(args),
        inputs=f"      inputs:\n        parameters:\n{inputs}" if inputs else "",
        outputs=f"      outputs:\n        parameters:\n{outputs}" if outputs else "",
        env=env,
        cpu=size.cpu, memory=size.memory, most_cpu=size.most_cpu, most_memory=size.most_memory,
        shared_memory=SHARED_MEMORY if pod.image == "clip" else "",
        shared_memory_mount=SHARED_MEMORY_MOUNT if pod.image == "clip" else "",
        gpu=GPU if pod.gpu else "\n        containers:",
    )  # fmt: skip


def _arguments(pod: Pod) -> str:
    """Of a workflow that runs this pod alone; as a part of a run, those of the run count."""
    lines = ["      - {name: runs, valueFrom: {configMapKeyRef: {name: rpl, key: runs}}}", "      - {name: run}"]
    lines += [
        f"      - {{name: {name}{'' if v is None else f', value: {json.dumps(v)}'}}}" for name, v in pod.inputs.items()
    ]
    keys = [f"image-{pod.image}", *(("gpus", "gpu-node-selector", "gpu-tolerations") if pod.gpu else ())]
    lines += [f"      - {{name: {key}, valueFrom: {{configMapKeyRef: {{name: rpl, key: {key}}}}}}}" for key in keys]
    return "\n".join(lines)


SHARED_MEMORY = """
        # Decoded pictures travel from worker processes in shared memory; a pod's default of 64 MB is too little.
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: 2Gi}"""
SHARED_MEMORY_MOUNT = """
          - {name: shm, mountPath: /dev/shm}"""

GPU = """
        nodeSelector: {{workflow.parameters.gpu-node-selector}}
        tolerations: {{workflow.parameters.gpu-tolerations}}
        containers:
          - name: main
            resources: {limits: {nvidia.com/gpu: "{{workflow.parameters.gpus}}"}}"""

TEMPLATE = """\
# Written by argo/generate.py (make argo); edit there.
apiVersion: argoproj.io/v1alpha1
kind: WorkflowTemplate
metadata:
  name: rpl-{name}
  labels:
    app.kubernetes.io/name: rpl
    app.kubernetes.io/part-of: rpl
    app.kubernetes.io/component: {name}
  annotations:
    workflows.argoproj.io/title: "{name}"
    workflows.argoproj.io/description: "{title}."
spec:
  entrypoint: {name}
  ttlStrategy: {{secondsAfterCompletion: 604800}}
  podGC: {{strategy: OnPodSuccess, deleteDelayDuration: 10m}}
  arguments:
    parameters:
{arguments}
  templates:
    - name: {name}
      metadata:
        labels:
          app.kubernetes.io/name: rpl
          app.kubernetes.io/part-of: rpl
          app.kubernetes.io/component: {name}
        annotations:
          workflows.argoproj.io/description: "{title}."
{inputs}{outputs}\
      # 75: the stage says that another try may do. Error: the pod was deleted or its node lost. -1: it was evicted.
      # 137, 143: it was killed. Never 2 (bad input) or 1 (a bug). Policy and expression must both say yes.
      retryStrategy:
        limit: "10"
        retryPolicy: Always
        expression: >-
          lastRetry.status == 'Error' ||
          (asInt(lastRetry.exitCode) in [-1, 75, 137, 143] &&
          !(lastRetry.message contains 'OOMKilled') && !(lastRetry.message contains 'specified deadline'))
        backoff: {{duration: 5s, factor: "2", maxDuration: 6h, cap: 5m}}
      serviceAccountName: rpl
      automountServiceAccountToken: false
      executor: {{serviceAccountName: rpl-executor}}
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        seccompProfile: {{type: RuntimeDefault}}
      volumes:
        - name: tmp
          emptyDir: {{}}{shared_memory}
      container:
        image: "{{{{workflow.parameters.image-{image}}}}}"
        imagePullPolicy: IfNotPresent
        command: [python]
        args: {args}
        envFrom:
          - configMapRef: {{name: rpl-env}}
          - secretRef: {{name: rpl-s3, optional: true}}
        env:
          - {{name: RPL_ATTEMPT, value: "{{{{retries}}}}"}}
{env}        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {{drop: [ALL]}}
        resources:
          requests: {{cpu: {cpu}, memory: {memory}}}
          limits: {{cpu: "{most_cpu}", memory: {most_memory}}}
        volumeMounts:
          - {{name: tmp, mountPath: /tmp}}{shared_memory_mount}
      # What Argo has no field for: its own two containers obey restricted Pod Security, and the GPU is a parameter.
      podSpecPatch: |{gpu}
          - name: wait
            securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}
            resources: {{requests: {{cpu: 10m, memory: 64Mi}}, limits: {{cpu: "1", memory: 512Mi}}}}
        initContainers:
          - name: init
            securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}
            resources: {{requests: {{cpu: 10m, memory: 64Mi}}, limits: {{cpu: "1", memory: 512Mi}}}}
"""


def main() -> None:
    for pod in pods():
        (FOLDER / f"rpl-{pod.name}.yaml").write_text(template(pod), encoding="utf-8")


if __name__ == "__main__":
    main()
