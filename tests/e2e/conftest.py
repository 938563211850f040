"""A kind cluster with the demo's tiny world, as `make local` makes it, for the tests of this folder.

The variables of `rpl.demo.cluster.Settings` (RPL_KIND_NODE, RPL_ARGO_MANIFEST, …) say where images come from. The
cluster is kept with RPL_E2E_KEEP=1, and a kept one is taken again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rpl.demo.cluster import Cluster, Settings, prepare
from rpl.demo.programs import check_programs, run
from rpl.errors import BadInput

# The one time in any output is when a picture was fetched; with it fixed, two runs can be compared by their bytes.
FIXED_TIME = ("--set", "extraEnv[0].name=SOURCE_DATE_EPOCH", "--set-string", "extraEnv[0].value=1764000000")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    settings = replace(
        Settings.from_environment(), cluster="rpl-e2e", scale="tiny", directory=".e2e", output=".e2e/output"
    )
    try:
        check_programs(settings.docker)
    except BadInput as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no cluster can be made here: {error}")
    found = prepare(settings, *FIXED_TIME)
    yield found
    if not os.environ.get("RPL_E2E_KEEP"):
        run("kind", "delete", "cluster", "--name", settings.cluster)
