"""The sandbox's SQS beside moto's, in one run: send, receive and delete through the same light client.

    python -m tests.benchmarks.bench_sqs_double [--messages 15000] [--moto-messages 300]

Each server is a process of its own. moto slows down with every message that waits, so it gets few; the same number is
also run against ours. Clients sign once and reuse the signature (neither server checks it), since botocore would be
what is measured otherwise.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

BODY = json.dumps(
    {
        "version": "0",
        "id": "00000000-0000-0000-0000-000000000000",
        "detail-type": "EC2 Spot Instance Interruption Warning",
        "source": "aws.ec2",
        "account": "111111111111",
        "time": "2026-01-02T03:04:05Z",
        "region": "us-east-1",
        "resources": ["arn:aws:ec2:us-east-1b:instance/i-0123456789abcdef0"],
        "detail": {"instance-id": "i-0123456789abcdef0", "instance-action": "terminate"},
    }
)
OURS = """
import sys, pathlib, time
from control.sandbox.aws import SandboxAWSThread, SandboxConfig
with SandboxAWSThread(SandboxConfig(home=pathlib.Path(sys.argv[1]))) as aws:
    print(aws.url, flush=True)
    sys.stdin.read()
"""
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
print(f"http://{host}:{port}", flush=True)
sys.stdin.read()
server.stop()
"""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def server(program: str) -> Iterator[tuple[str, psutil.Process]]:
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", program, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()


class Client:
    """One keep-alive connection that speaks SQS's JSON protocol."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._http = http.client.HTTPConnection(parts.hostname, parts.port)
        self._http.connect()
        request = AWSRequest("POST", url + "/", headers={"Content-Type": "application/x-amz-json-1.0"}, data=b"")
        SigV4Auth(Credentials("AKIAEXAMPLEEXAMPLE00", "secret"), "sqs", "us-east-1").add_auth(request)
        self._headers = dict(request.headers.items())

    def call(self, action: str, body: dict[str, object]) -> dict[str, object]:
        headers = {**self._headers, "X-Amz-Target": f"AmazonSQS.{action}"}
        self._http.request("POST", "/", json.dumps(body), headers)
        response = self._http.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{action}: {response.status} {content[:200]!r}")
        answer: dict[str, object] = json.loads(content or b"{}")
        return answer


def drain(url: str, queue: str, taken: list[str]) -> None:
    client = Client(url)
    while True:
        answer = client.call("ReceiveMessage", {"QueueUrl": queue, "MaxNumberOfMessages": 10})
        messages: list[dict[str, str]] = answer.get("Messages") or []  # type: ignore[assignment]
        if not messages:
            return
        entries = [{"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]} for i, m in enumerate(messages)]
        client.call("DeleteMessageBatch", {"QueueUrl": queue, "Entries": entries})
        taken += [m["MessageId"] for m in messages]


def run(name: str, program: str, messages: int, receivers: int) -> float:
    with server(program) as (url, process):
        client = Client(url)
        queue = str(client.call("CreateQueue", {"QueueName": "storm"})["QueueUrl"])
        started = time.perf_counter()
        for first in range(0, messages, 10):
            entries = [{"Id": str(i), "MessageBody": BODY} for i in range(first, min(first + 10, messages))]
            client.call("SendMessageBatch", {"QueueUrl": queue, "Entries": entries})
        sending = time.perf_counter() - started
        taken: list[str] = []
        threads = [threading.Thread(target=drain, args=(url, queue, taken)) for _ in range(receivers)]
        before = process.cpu_times()
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        receiving = time.perf_counter() - started
        after = process.cpu_times()
        cpu = after.user + after.system - before.user - before.system
        if len(taken) != messages or len(set(taken)) != messages:
            raise RuntimeError(f"{name}: {messages} sent, {len(taken)} received, {len(set(taken))} of them distinct")
        rate = messages / receiving
        say(
            f"{name:22} {messages:6} messages: sent {messages / sending:7.0f}/s, received and deleted {rate:7.0f}/s, "
            f"{messages / cpu:7.0f} per CPU-second of the server, {process.memory_info().rss / 2**20:.0f} MiB"
        )
        return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=15_000)
    parser.add_argument("--moto-messages", type=int, default=300)
    parser.add_argument("--receivers", type=int, default=4)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    run("sandbox", OURS, options.messages, options.receivers)
    ours = run("sandbox", OURS, options.moto_messages, options.receivers)
    moto = run("moto", MOTO, options.moto_messages, options.receivers)
    say(f"ratio at {options.moto_messages} messages: {ours / moto:.0f}")


if __name__ == "__main__":
    main()
