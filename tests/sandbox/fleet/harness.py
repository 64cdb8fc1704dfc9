"""The sandbox's own process in a temporary home, with a hurried fleet, and the official clients to look at it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import httpx
from kubernetes import client

SECRETS = {
    "JWT_SECRET_KEY": "j" * 40,
    "API_KEY_SALT": "p" * 40,
    "CLOUDOPTIM_MASTER_KEY": "m" * 40,
}


class RunningSandbox:
    """`cloudoptim sandbox run`, twenty times as fast as life unless told otherwise."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.log = home / "sandbox.log"
        home.mkdir(parents=True, exist_ok=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CLOUDOPTIM_", "AWS_", "DATABASE_URL", "DB_"))
        }
        self._environment = {
            **inherited,
            **SECRETS,
            "CLOUDOPTIM_HOME": str(home),
            "CLOUDOPTIM_SANDBOX_PORT": "0",
            "CLOUDOPTIM_SANDBOX_SPEED": "20",
            "CLOUDOPTIM_SANDBOX_INTERRUPTION_SCALE": "0",
            "MALLOC_ARENA_MAX": "2",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.addresses: dict[str, Any] = {}

    def start(self) -> RunningSandbox:
        (self.home / "sandbox" / "addresses.json").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "control.cli", "sandbox", "run"], env=self._environment, stdout=log, stderr=log
            )
        file = self.home / "sandbox" / "addresses.json"

        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the sandbox ended:\n{self.log.read_text()[-3000:]}")
            return file.exists()

        eventually(ready, 120, "addresses.json")
        self.addresses = json.loads(file.read_text())
        return self

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(30) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def cluster(self, name: str) -> dict[str, Any]:
        return next(
            c for customer in self.addresses["customers"] for c in customer["clusters"] if c["cluster_name"] == name
        )

    def customer_of(self, cluster: str) -> dict[str, Any]:
        return next(c for c in self.addresses["customers"] if any(k["cluster_name"] == cluster for k in c["clusters"]))

    def core(self, cluster: str) -> client.CoreV1Api:
        address = self.cluster(cluster)
        configuration = client.Configuration(host=address["k8s_endpoint"])
        configuration.api_key["authorization"] = f"Bearer {address['k8s_token']}"
        return client.CoreV1Api(client.ApiClient(configuration))

    def aws(self, service: str, cluster: str) -> Any:
        """A boto3 client with credentials of the customer's role, assumed as the server does it."""
        customer, region = self.customer_of(cluster), self.cluster(cluster)["region"]
        endpoint = self.addresses["aws_endpoint"]
        sts = boto3.client(
            "sts",
            region_name=region,
            endpoint_url=endpoint,
            aws_access_key_id="AKIAPLATFORM",
            aws_secret_access_key="x",
        )
        given = sts.assume_role(
            RoleArn=customer["role_arn"], RoleSessionName="test", ExternalId=customer["external_id"]
        )["Credentials"]
        sts.close()
        return boto3.client(
            service,
            region_name=region,
            endpoint_url=endpoint,
            aws_access_key_id=given["AccessKeyId"],
            aws_secret_access_key=given["SecretAccessKey"],
            aws_session_token=given["SessionToken"],
        )

    def running_instances(self, cluster: str) -> dict[str, dict[str, Any]]:
        ec2 = self.aws("ec2", cluster)
        pages = ec2.get_paginator("describe_instances").paginate(
            Filters=[
                {"Name": "instance-state-name", "Values": ["pending", "running"]},
                {"Name": "tag-key", "Values": [f"kubernetes.io/cluster/{cluster}"]},
            ]
        )
        found = {
            i["InstanceId"]: i
            for page in pages
            for reservation in page["Reservations"]
            for i in reservation["Instances"]
        }
        ec2.close()
        return found

    def messages(self, cluster: str) -> list[dict[str, Any]]:
        """Everything on the customer's queue right now, taken."""
        sqs, taken = self.aws("sqs", cluster), []
        url = self.customer_of(cluster)["queue_url"]
        while got := sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", []):
            for message in got:
                taken.append(json.loads(message["Body"]))
                sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        sqs.close()
        return taken

    def control(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return httpx.request(method, self.addresses["control_endpoint"] + path, json=body, timeout=10)


def instance_of(node: client.V1Node) -> str:
    return node.spec.provider_id.rsplit("/", 1)[1]


def ready(node: client.V1Node) -> bool:
    return any(c.type == "Ready" and c.status == "True" for c in node.status.conditions)


def eventually(check: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """Poll until `check` returns something true, and return it."""
    give_up = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {seconds} s: {what or check}")
        time.sleep(0.05)
