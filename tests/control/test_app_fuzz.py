"""Schemathesis over the OpenAPI document: no input makes a server error, and answers are what the document says."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.control.api import ADMIN_KEY

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,unsupported_method"
# These ask other systems (AWS, Dagster), which a test of inputs has none of.
OTHER_SYSTEMS = "/verify|/gap-filler/"


@pytest.mark.timeout(150)
async def test_no_input_makes_a_server_error(api, tenant, tmp_path: Path):
    report = tmp_path / "schemathesis.txt"
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{api.url}/openapi.json",
        "--header",
        f"Authorization: Bearer {ADMIN_KEY}",
        "--checks",
        CHECKS,
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        "4",
        "--max-time",
        "25",
        "--exclude-path-regex",
        OTHER_SYSTEMS,
        "--seed",
        "7",
        "--request-timeout",
        "20",
        "--warnings",
        "off",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    report.write_bytes(output)
    await api.app.state.context.redis.flushdb()
    assert process.returncode == 0, output.decode()[-6000:]
