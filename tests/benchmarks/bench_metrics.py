"""Samples per second that one API process commits, with everything on: keys, validation, idempotency, late marking.

    .venv/bin/python -m tests.benchmarks.bench_metrics [--seconds 10] [--senders 8] [--samples 1200]

Starts its own Postgres, Redis and API process; prints one JSON object. Bodies are made before the clock starts. Every
figure is of samples counted in Postgres after the run; `per_cpu_second` includes the API and Postgres, not the senders.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import psycopg

from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from tests.control.api import ADMIN_KEY
from warehouse.postgres.migrate import upgrade


def body(cluster_id: str, seq: int, samples: int) -> bytes:
    """A batch as the reference agent sends it: nodes' metrics at one moment."""
    at = (datetime.now(UTC) - timedelta(seconds=seq % 300)).isoformat()
    names = ("node_cpu_usage_cores", "node_memory_usage_bytes", "workload_cpu_usage_cores", "workload_replicas")
    columns = {
        "metric": [names[number % 4] for number in range(samples)],
        "subject": [f"default/Deployment/service-{number // 4}" for number in range(samples)],
        "ts": [at] * samples,
        "value": [0.001 * (number * 7919 % 1000) for number in range(samples)],
    }
    return json.dumps(
        {
            "batch_id": str(uuid4()),
            "seq": seq,
            "cluster_id": cluster_id,
            "sent_at": datetime.now(UTC).isoformat(),
            "samples": columns,
        }
    ).encode()


async def run(url: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Send as fast as answers come, from several keep-alive connections."""
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=30, trust_env=False) as client:
        clusters = []
        for number in range(arguments.senders):
            customer = await client.post(
                "/customers", headers=admin, json={"company_name": "B", "email": f"b{number}@example.com"}
            )
            cluster = await client.post(
                "/clusters",
                headers=admin,
                json={"customer_id": customer.json()["id"], "cluster_name": "main", "region": "us-east-1"},
            )
            clusters.append(cluster.json())
    ready = [[body(cluster["id"], seq, arguments.samples) for seq in range(arguments.bodies)] for cluster in clusters]
    lags: list[float] = []
    sent = 0
    ends = time.monotonic() + arguments.seconds

    async def sender(cluster: dict, bodies: list[bytes]) -> None:
        nonlocal sent
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for content in bodies:
            if time.monotonic() > ends:
                break
            started = time.perf_counter()
            writer.write(
                f"POST /api/v1/client/metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {cluster['agent_key']}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            lags.append(time.perf_counter() - started)
            sent += arguments.samples
        writer.close()

    started = time.monotonic()
    await asyncio.gather(*(sender(cluster, bodies) for cluster, bodies in zip(clusters, ready, strict=True)))
    elapsed = time.monotonic() - started
    return {
        "sent": sent,
        "seconds": round(elapsed, 2),
        "samples_per_second": round(sent / elapsed),
        "ack_p50_ms": round(statistics.median(lags) * 1000, 1),
        "ack_p99_ms": round(statistics.quantiles(lags, n=100)[98] * 1000, 1),
    }


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its children."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--bodies", type=int, default=400)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cloudoptim-bench-"))
    folder.chmod(0o755)
    postgres = EmbeddedPostgres(folder / "postgres", port=free_port()).start()
    redis = EmbeddedRedis(folder / "redis", port=free_port()).start()
    port = free_port()
    environment = os.environ | {
        "DATABASE_URL": postgres.url("bench"),
        "REDIS_URL": redis.url,
        "JWT_SECRET_KEY": "j" * 40,
        "API_KEY_SALT": "p" * 40,
        "CLOUDOPTIM_MASTER_KEY": "m" * 40,
        "CLOUDOPTIM_ADMIN_API_KEY": ADMIN_KEY,
        "CENTRAL_SERVER_PORT": str(port),
        "CLOUDOPTIM_RATE_LIMIT_PER_KEY": "none",
        "CLOUDOPTIM_RATE_LIMIT_PER_CUSTOMER": "none",
        "CLOUDOPTIM_LOG_LEVEL": "WARNING",
    }
    try:
        postgres.ensure_database("bench")
        upgrade(postgres.url("bench"))
        server = subprocess.Popen([sys.executable, "-m", "control.cli", "control"], env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while True:
                try:
                    if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise
                time.sleep(0.1)
            api = psutil.Process(server.pid)
            with psycopg.connect(postgres.url("bench"), autocommit=True) as connection:
                (pid,) = connection.execute("SELECT pg_backend_pid()").fetchone()
                postmaster = psutil.Process(pid).parent()
                before = cpu_seconds(api), cpu_seconds(postmaster)
                figures = asyncio.run(run(url, arguments))
                used = cpu_seconds(api) - before[0], cpu_seconds(postmaster) - before[1]
                connection.execute("SET role cloudoptim_system")
                (counted,) = connection.execute("SELECT count(*) FROM metric_samples").fetchone()
            figures |= {
                "counted_in_postgres": counted,
                "lost_or_doubled": counted - figures["sent"],
                "api_cpu_seconds": round(used[0], 2),
                "postgres_cpu_seconds": round(used[1], 2),
                "per_cpu_second": round(counted / max(sum(used), 0.01)),
                "api_rss_mib": api.memory_info().rss >> 20,
            }
            print(json.dumps(figures))  # noqa: T201
        finally:
            server.terminate()
            server.wait(15)
    finally:
        redis.stop()
        postgres.stop()


if __name__ == "__main__":
    main()
