"""The demo on a Kubernetes cluster of its own: kind, Argo Workflows, an S3 server, the chart, one run.

    python -m rpl.demo.cluster up      (make local)       every step again finds what is there, and goes on
    python -m rpl.demo.cluster down    (make local-down)

Needs docker, kind, kubectl, helm and argo. What it makes it can remove: the cluster, and nothing outside it but images.
Public names of images and releases are the defaults; the variables of `Settings` replace them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rpl.config import dump_config
from rpl.demo import s3
from rpl.demo.objects import config_map, namespace, secret, service_account
from rpl.demo.programs import check_programs, has_image, run, wait_for_port
from rpl.demo.run import demo_config
from rpl.demo.world_files import CLIP_FOLDER, CLIP_MODEL, CLIP_WEIGHTS, FULL, HOSTS, TINY, find_world, identity
from rpl.errors import BadInput, RplError, TryAgain
from rpl.report.summary import summary_table

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "helm" / "local"
CHART = ROOT / "helm" / "rpl"
NAMESPACE = "rpl"
SERVICES = "rpl-local"
BUCKET = "rpl"
WEB_ADDRESS = "10.96.111.111"  # of the web's service, inside kind's range
SEED = 0

ENDED = ("Succeeded", "Failed", "Error")
ARGO_IMAGES = ("workflow-controller", "argoexec", "argocli")
TARGETS = ("light", "clip", "s3", "monitoring")


@dataclass(frozen=True)
class Settings:
    """What may differ from one machine to another; each from the variable of its name in capitals with RPL_ before."""

    cluster: str = "rpl"
    """Name of the kind cluster."""
    docker: str = "docker"
    """The docker client that builds; its BuildKit is used."""
    kind_node: str = ""
    """Node image; empty: kind's own choice."""
    argo_manifest: str = "https://github.com/argoproj/argo-workflows/releases/download/v3.7.4/install.yaml"
    """Argo's released manifest: a URL or a path."""
    argo_images: str = "quay.io/argoproj/{}:v3.7.4"
    """Loaded into the cluster if this machine has them; else the cluster pulls them."""
    torch_index: str = ""
    """Index of PyTorch's CPU builds; empty: PyPI, whose build for CUDA is 4 GB larger."""
    scale: str = "full"
    """Size of the demo's world: full or tiny."""
    directory: str = ".demo-cluster"
    """Where the world is drawn, and what must be remembered."""
    output: str = "local-output"
    """Where the results are copied to."""

    @classmethod
    def from_environment(cls) -> Settings:
        names = (field.name for field in fields(cls))
        return cls(**{name: value for name in names if (value := os.environ.get(f"RPL_{name.upper()}"))})

    @property
    def context(self) -> str:
        return f"kind-{self.cluster}"


class Cluster:
    """The programs, called for one cluster. Nothing is remembered here: each step looks at what is there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def kubectl(self, *arguments: str, stdin: str | None = None, quiet: bool = False) -> str:
        return run("kubectl", "--context", self.settings.context, *arguments, stdin=stdin, quiet=quiet)

    def argo(self, *arguments: str) -> str:
        return run("argo", "--context", self.settings.context, "-n", NAMESPACE, *arguments)

    def helm(self, *arguments: str) -> str:
        # quiet: it remarks on every symbolic link that it follows
        return run("helm", "--kube-context", self.settings.context, "-n", NAMESPACE, *arguments, quiet=True)

    def apply(self, text: str) -> None:
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text, quiet=True)

    def is_up(self) -> bool:
        return self.settings.cluster in run("kind", "get", "clusters", quiet=True).split()

    # The steps of `up`, in order.

    def make(self) -> None:
        """The cluster itself; its second node advertises a GPU that it has not."""
        if not self.is_up():
            image = ["--image", self.settings.kind_node] if self.settings.kind_node else []
            run("kind", "create", "cluster", "--name", self.settings.cluster, "--config", str(LOCAL / "kind.yaml"),
                "--wait", "180s", *image)  # fmt: skip
        taint = "node-role.kubernetes.io/control-plane"
        if taint in self.kubectl("get", "node", self.main_node, "-o", "jsonpath={.spec.taints}", quiet=True):
            self.kubectl("taint", "node", self.main_node, f"{taint}-", quiet=True)
        # The helpers of kind's volume provisioner run under this account, which not every node image brings.
        self.apply(service_account("local-path-provisioner-service-account", "local-path-storage"))
        self.advertise_gpu()

    def advertise_gpu(self) -> None:
        """As a device plugin would; a kubelet that starts again forgets it."""
        node = self.gpu_node
        patch = '[{"op":"add","path":"/status/capacity/nvidia.com~1gpu","value":"1"}]'
        self.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", patch, quiet=True)
        self.kubectl("taint", "node", node, "nvidia.com/gpu=present:NoSchedule", "--overwrite", quiet=True)

    @property
    def main_node(self) -> str:
        return f"{self.settings.cluster}-control-plane"

    @property
    def gpu_node(self) -> str:
        return f"{self.settings.cluster}-worker"

    def load(self, node: str, *images: str) -> None:
        """Images of this machine into one of the cluster's nodes; those that are there already are not sent again."""
        run("kind", "load", "docker-image", "--name", self.settings.cluster, "--nodes", node, *images, quiet=True)

    def load_images(self, images: dict[str, str]) -> None:
        """Each to the one node that runs it, both nodes at once: they are gigabytes."""
        others = [reference for name, reference in images.items() if name != "clip"]
        with ThreadPoolExecutor() as pool:
            clip = pool.submit(self.load, self.gpu_node, images["clip"])
            self.load(self.main_node, *others)
            clip.result()

    def install_argo(self) -> None:
        images = [self.settings.argo_images.format(name) for name in ARGO_IMAGES]
        here = [image for image in images if has_image(self.settings.docker, image)]
        if here:
            for node in (self.main_node, self.gpu_node):
                self.load(node, *here)
        self.apply(namespace("argo"))
        self.kubectl("apply", "--server-side", "--force-conflicts", "-n", "argo", "-f", self.settings.argo_manifest,
                     quiet=True)  # fmt: skip
        # Else its page asks for a token, which kind's users do not have.
        self.apply((LOCAL / "argo-watch.yaml").read_text())
        self.kubectl("-n", "argo", "set", "env", "deploy/argo-server", "ARGO_AUTH_MODE=server", quiet=True)
        # It looks at a workflow every ten seconds at most, which is longer than the demo's stages take.
        self.kubectl("-n", "argo", "set", "env", "deploy/workflow-controller", "DEFAULT_REQUEUE_TIME=1s", quiet=True)
        for name in ("workflow-controller", "argo-server"):
            self.kubectl("-n", "argo", "rollout", "status", f"deploy/{name}", "--timeout=300s", quiet=True)

    def build_images(self) -> dict[str, str]:
        """Name → reference, tagged by content, so that a changed image is a new one to the cluster."""
        index = self.settings.torch_index
        options = ["--build-arg", f"TORCH_INDEX={index}"] if index else []
        built = {name: self._build(name, "images/Dockerfile", ".", "--target", name, *options) for name in TARGETS}
        web = self.world / "web"
        light = built["light"]
        built["web"] = self._build("web", "images/demo-web.Dockerfile", str(web), "--build-arg", f"LIGHT={light}")
        return built

    def _build(self, name: str, file: str, context: str, *options: str) -> str:
        docker = self.settings.docker
        image = run(
            docker, "build", "-q", "-f", file, *options, context,
            quiet=True, cwd=ROOT, env={"DOCKER_BUILDKIT": "1"},
        ).strip()  # fmt: skip
        reference = f"rpl-{name}:{image.removeprefix('sha256:')[:12]}"
        run(docker, "tag", image, reference, quiet=True)
        return reference

    @property
    def world(self) -> Path:
        return (Path(self.settings.directory) / f"world-{self.settings.scale}").resolve()

    def draw_world(self) -> None:
        scale = {"full": FULL, "tiny": TINY}.get(self.settings.scale)
        if scale is None:
            raise BadInput(f"RPL_SCALE={self.settings.scale!r}: the demo's world is full or tiny; choose one.")
        if find_world(self.world, identity(SEED, scale, (CLIP_MODEL, CLIP_WEIGHTS))) is None:
            from rpl.demo.world import build_world

            build_world(self.world, seed=SEED, scale=scale)

    def start_services(self, images: dict[str, str]) -> dict[str, str]:
        """The S3 server, the web, Pushgateway and Prometheus; the S3 server's keys."""
        self.apply(namespace(SERVICES))
        keys = self._keys()
        users = s3.identities(keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
        self.apply(secret("s3-keys", SERVICES, {"keys.json": json.dumps(users)}))
        rules = CHART / "files" / "alerts.yaml"
        config = {"prometheus.yml": (LOCAL / "prometheus.yml").read_text(), "alerts.yaml": rules.read_text()}
        self.apply(config_map("prometheus", SERVICES, config))
        text = (LOCAL / "services.yaml").read_text()
        values = {f"image-{name}": reference for name, reference in images.items()} | {"web-address": WEB_ADDRESS}
        values["s3-options"] = ", ".join(s3.OPTIONS)
        self.apply(re.sub(r"\$\(([a-z0-9-]+)\)", lambda match: values[match[1]], text))
        for name in ("s3", "web", "pushgateway", "prometheus"):
            self.kubectl("-n", SERVICES, "rollout", "status", f"deploy/{name}", "--timeout=300s", quiet=True)
        return keys

    def _keys(self) -> dict[str, str]:
        """Made once and kept in this machine's folder, readable by its owner alone."""
        file = Path(self.settings.directory) / "keys.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
            s3.write_private(file, json.dumps(keys))
        found: dict[str, str] = json.loads(file.read_text())
        return found

    def install_chart(self, images: dict[str, str], keys: dict[str, str], *options: str) -> None:
        """The chart with `ci/local-values.yaml`; `options` of helm come last."""
        self.apply(namespace(NAMESPACE, restricted=True))
        self.apply(secret("rpl-s3", NAMESPACE, keys))
        tags = []
        for name in ("light", "clip"):
            repository, tag = images[name].split(":")
            tags += ["--set", f"images.{name}.repository={repository}", "--set-string", f"images.{name}.tag={tag}"]
        values = str(CHART / "ci" / "local-values.yaml")
        self.helm("upgrade", "--install", "rpl", str(CHART), "-f", values, *tags, *options, "--wait")

    @contextmanager
    def s3(self) -> Iterator[None]:
        """Within, this process reaches the cluster's S3 server in the usual variables."""
        keys = self._keys()
        with self.forwarded("s3", 8333) as port:
            endpoint = f"http://{s3.HOST}:{port}"
            here = s3.environment(endpoint, keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
            before = {name: os.environ.get(name) for name in here}
            os.environ.update(here)
            try:
                yield
            finally:
                for name, value in before.items():
                    os.environ.pop(name)
                    if value is not None:
                        os.environ[name] = value

    @contextmanager
    def forwarded(self, service: str, port: int, namespace: str = SERVICES) -> Iterator[int]:
        """A local port that leads to a service of the cluster."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = int(probe.getsockname()[1])
        command = ["kubectl", "--context", self.settings.context, "-n", namespace, "port-forward", f"service/{service}",
                   f"{local}:{port}"]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_for_port(local, process)
                yield local
            finally:
                process.terminate()

    def seed(self) -> None:
        """The world, the small CLIP and the run's configuration, as objects; those that are there stay."""
        import boto3

        from rpl.store import open_store

        with self.s3():
            client = boto3.client("s3")
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])]:
                client.create_bucket(Bucket=BUCKET)
            scale = self.settings.scale
            place = f"s3://{BUCKET}/demo-{scale}"
            files = {f"world/{path.relative_to(self.world)}": path for path in self.world.rglob("*")
                     if path.is_file() and not path.is_relative_to(self.world / "web")}  # fmt: skip
            files |= {f"clip/{path.name}": CLIP_FOLDER / path.name for path in (CLIP_MODEL, CLIP_WEIGHTS)}
            store = open_store(place)
            there = {info.path: info.size for info in store.list()}
            for name, path in sorted(files.items()):
                if there.get(name) != path.stat().st_size:
                    store.upload(name, path)
            resolve = dict.fromkeys(HOSTS, f"{WEB_ADDRESS}:8000")
            config = demo_config(f"{place}/world", f"s3://{BUCKET}/runs/unnamed", resolve, f"{place}/clip")
            open_store(f"s3://{BUCKET}/configs").write("demo.yaml", dump_config(config).encode())

    def submit(self, name: str, **parameters: str) -> str:
        """Submit argo/round.yaml for run `name`; the workflow's name."""
        options = [f"-p={key.replace('_', '-')}={value}" for key, value in {"run": name, **parameters}.items()]
        return self.argo("submit", str(ROOT / "argo" / "round.yaml"), "-o", "name", *options).strip()

    def follow(self, workflow: str, timeout_s: float) -> str:
        """Wait for the end, telling each step that ends; the phase."""
        told: set[str] = set()
        give_up = time.monotonic() + timeout_s
        while True:
            found = json.loads(self.argo("get", workflow, "-o", "json"))
            status = found.get("status", {})
            for node in sorted(status.get("nodes", {}).values(), key=lambda each: each.get("finishedAt") or ""):
                if node["type"] == "Pod" and node["phase"] in ENDED and node["id"] not in told:
                    told.add(node["id"])
                    say(f"  {node['phase']:<9} {described(node):<28} {node.get('message', '')}".rstrip())
            phase = status.get("phase", "")
            if phase in ENDED:
                return str(phase)
            if time.monotonic() > give_up:
                raise TryAgain(
                    f"{workflow}: not finished after {timeout_s:.0f} s; `argo get -n rpl {workflow}` tells more."
                )
            time.sleep(3)

    def fetch(self, name: str, directory: Path) -> dict[str, Any]:
        """Copy a run's results; the content of its summary.json."""
        from rpl.results import fetch_results
        from rpl.stage import Run

        with self.s3():
            found = Run(f"s3://{BUCKET}/runs/{name}")
            try:
                return fetch_results(found, directory)
            finally:
                found.close()


def described(node: dict[str, Any]) -> str:
    """A pod of a workflow in the words of a run: stage, round, shard."""
    given = {each["name"]: each.get("value", "") for each in node.get("inputs", {}).get("parameters", [])}
    words = [node["templateRef"]["name"].removeprefix("rpl-"), *(given.get(name, "") for name in ("round", "shard"))]
    return " ".join(word for word in words if word and word != "once")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(settings: Settings, *options: str) -> Cluster:
    """A cluster on which `argo submit argo/round.yaml -n rpl` works; `options` go to helm."""
    check_programs(settings.docker)
    cluster = Cluster(settings)
    with ThreadPoolExecutor() as pool:  # the one waits for its network and disk, the other for its pods
        empty = pool.submit(_empty_cluster, cluster)
        say("drawing the demo's world")
        cluster.draw_world()
        say("building images")
        images = cluster.build_images()
        empty.result()
    say("loading images into the cluster")
    cluster.load_images(images)
    say("S3 server, web, Pushgateway, Prometheus")
    keys = cluster.start_services(images)
    say("the chart")
    cluster.install_chart(images, keys, *options)
    say("copying the world to S3")
    cluster.seed()
    return cluster


def _empty_cluster(cluster: Cluster) -> None:
    say(f"cluster {cluster.settings.cluster!r} with Argo Workflows")
    cluster.make()
    cluster.install_argo()


def up(settings: Settings, name: str) -> None:
    cluster = prepare(settings)
    say(f"run {name!r}: argo submit argo/round.yaml -n rpl -p run={name}")
    workflow = cluster.submit(name)
    phase = cluster.follow(workflow, timeout_s=3600)
    if phase != "Succeeded":
        sys.stderr.write(cluster.argo("get", workflow))
        raise TryAgain(f"{workflow}: {phase}; see above, and `argo logs -n rpl {workflow}`.")
    output = Path(settings.output).resolve()
    summary = cluster.fetch(name, output)
    print(
        f"{summary_table(summary)}\n\nReport: {output / 'report' / 'index.html'}\n"
        f"Watch:  kubectl --context {settings.context} -n argo port-forward service/argo-server 2746\n"
        f"        then open https://localhost:2746/workflows/{NAMESPACE} (its certificate is its own)\n"
        f"Again:  argo submit argo/round.yaml -n rpl -p run=another"
    )


def down(settings: Settings) -> None:
    check_programs(settings.docker)
    run("kind", "delete", "cluster", "--name", settings.cluster)
    shutil.rmtree(settings.directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rpl.demo.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--run", default="first", help="name of the run")
    options = parser.parse_args()
    settings = Settings.from_environment()
    try:
        up(settings, options.run) if options.action == "up" else down(settings)
    except RplError as error:
        say(f"Error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
