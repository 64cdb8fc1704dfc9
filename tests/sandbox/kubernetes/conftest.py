"""Fresh clusters of the Kubernetes double per test and the official client that drives it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubernetes import client
from starlette.applications import Starlette

from control.sandbox.kubernetes.server import ServerThread
from tests.sandbox.kubernetes.harness import Double


@pytest.fixture(scope="session")
def kubernetes_server() -> Iterator[tuple[ServerThread, Starlette]]:
    app = Starlette()
    server = ServerThread(app)
    server.start()
    yield server, app
    server.stop()


@pytest.fixture
def double(kubernetes_server: tuple[ServerThread, Starlette]) -> Iterator[Double]:
    running = Double(*kubernetes_server)
    yield running
    running.close()


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
