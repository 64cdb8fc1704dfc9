"""A Kubernetes double per test and the official client that drives it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubernetes import client

from tests.sandbox.kubernetes.harness import Double


@pytest.fixture
def double() -> Iterator[Double]:
    running = Double()
    running.server.start()
    yield running
    for cluster in running.clusters:
        running.call(cluster.controllers.stop)
        running.call(cluster.store.close)
    running.server.stop()


@pytest.fixture
def api(double: Double) -> Iterator[client.ApiClient]:
    with double.client() as api_client:
        yield api_client


@pytest.fixture
def core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


@pytest.fixture
def apps(api: client.ApiClient) -> client.AppsV1Api:
    return client.AppsV1Api(api)


@pytest.fixture
def policy(api: client.ApiClient) -> client.PolicyV1Api:
    return client.PolicyV1Api(api)
