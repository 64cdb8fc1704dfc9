"""Workers that start in milliseconds: a process that has imported everything forks one for every line it reads.

A worker spends two seconds on imports; a thousand kills would spend most of their time there. What is forked runs
``control.worker.main()`` like ``python -m control.worker`` does, with the environment and the log file of the line.

Input, one JSON document a line: {"environment": {...}, "log": path}. Output: {"pid": 1} for each, in order, and
{"pid": 1, "status": 0} when that one has ended. An argument names a mutation of ``mutations.WORKERS`` that is applied
before the first fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import sys
import traceback
from typing import Any

from control import worker
from control.gateways import aws

PR_SET_PDEATHSIG = 1


def main() -> None:
    if len(sys.argv) > 1:
        from tests.control.interruptions import mutations

        mutations.WORKERS[sys.argv[1]]()
    for service in ("sts", "sqs", "ec2"):
        aws._service(service)
    gc.collect()
    gc.freeze()
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        pending = b""
        while True:
            for key, _ in selector.select():
                if key.fd != 0:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data, 0)
                    _say({"pid": key.data, "status": os.waitstatus_to_exitcode(status)})
                    continue
                read = os.read(0, 1 << 16)
                if not read:
                    return
                *lines, pending = (pending + read).split(b"\n")
                for line in lines:
                    pid = _fork(json.loads(line))
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                    _say({"pid": pid})


def _say(document: dict[str, Any]) -> None:
    os.write(1, json.dumps(document).encode() + b"\n")


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # Nothing outlives the test session, not even when that is killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(order["environment"])
        worker.main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    return 0


if __name__ == "__main__":
    main()
