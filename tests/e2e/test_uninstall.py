"""The chart's own test, and that nothing of it is left when it goes. The last of this folder's files."""

from __future__ import annotations

from rpl.demo.cluster import NAMESPACE, Cluster


def test_the_chart_tests_itself_and_leaves_without_a_trace(cluster: Cluster) -> None:
    cluster.helm("test", "rpl", "--timeout", "120s")
    cluster.helm("uninstall", "rpl", "--wait")
    kinds = "workflowtemplates,cronworkflows,serviceaccounts,configmaps,roles,rolebindings,networkpolicies"
    left = cluster.kubectl("-n", NAMESPACE, "get", kinds, "-l", "app.kubernetes.io/name=rpl", "-o", "name")
    assert left.strip() == ""
