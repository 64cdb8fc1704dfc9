"""What EC2 tells a node itself, published where the agent sees it: one process on each Spot node (a DaemonSet).

Instance metadata (IMDSv2) is asked every two seconds for `spot/instance-action` and
`events/recommendations/rebalance`; an answer is kept, unchanged, in an annotation of the Node, and taken away when the
metadata says so no more: a node that was stopped and started is not under the notice of then. The agent reports
annotations to the server (`notices`). Nothing is kept here: a restart reads and publishes again.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time

import httpx

from control.agent.cluster import Cluster, ClusterError
from control.agent.config import ConfigError, NodeConfig, read_node_config
from control.agent.notices import INSTANCE_ACTION_ANNOTATION, REBALANCE_ANNOTATION
from control.agent.server import Backoff

log = logging.getLogger("cloudoptim.node_watch")

# EC2 asks to look every five seconds; a notice has two minutes, and the agent is to have it within ten seconds.
INTERVAL_SECONDS = 2.0
TOKEN_SECONDS = 21_600
REQUEST_SECONDS = 2.0
PATHS = {
    INSTANCE_ACTION_ANNOTATION: "/latest/meta-data/spot/instance-action",
    REBALANCE_ANNOTATION: "/latest/meta-data/events/recommendations/rebalance",
}


class MetadataError(Exception):
    """Instance metadata cannot be read; the message says why."""


class Metadata:
    """The instance metadata service, version 2."""

    def __init__(self, url: str) -> None:
        # Metadata is never behind a proxy, whatever the environment says.
        self._client = httpx.Client(base_url=url, timeout=REQUEST_SECONDS, trust_env=False)
        self._token = ""
        self._token_until = 0.0

    def read(self, path: str) -> str | None:
        """The document at a path; None: there is none.

        Raises:
            MetadataError: no answer, or another one than the service gives.
        """
        answer = self._get(path)
        if answer.status_code == 401:
            # The token ended early: the instance was stopped and started, or the service's clock moved.
            self._token_until = 0.0
            answer = self._get(path)
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise MetadataError(f"{path} is answered {answer.status_code}")
        return answer.text

    def _get(self, path: str) -> httpx.Response:
        try:
            if time.monotonic() >= self._token_until:
                asked = time.monotonic()
                answer = self._client.put(
                    "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                )
                if answer.status_code != 200:
                    raise MetadataError(f"a token is answered {answer.status_code}; is metadata switched on?")
                self._token, self._token_until = answer.text, asked + TOKEN_SECONDS / 2
            return self._client.get(path, headers={"X-aws-ec2-metadata-token": self._token})
        except httpx.HTTPError as error:
            raise MetadataError(
                f"no answer ({type(error).__name__}); a pod without host network needs a hop limit of 2"
            ) from None


class NodeWatch:
    """The loop of one node."""

    def __init__(self, config: NodeConfig) -> None:
        self._name = config.node_name
        self._metadata = Metadata(config.metadata_url)
        self._cluster = Cluster(config, connections=1)
        # As published last; what an earlier life published is not known, and replaced by the first look.
        self._published: dict[str, str | None] | None = None

    def look(self) -> None:
        """Read the notices, and publish what is not published yet.

        Raises:
            MetadataError, ClusterError: one of the two does not answer; the next look does all that was missed.
        """
        said = {annotation: self._metadata.read(path) for annotation, path in PATHS.items()}
        news = said != self._published
        # For the two minutes of an interruption it is said again with every look: the Node may be registered anew.
        if not news and said[INSTANCE_ACTION_ANNOTATION] is None:
            return
        self._cluster.patch(f"/api/v1/nodes/{self._name}", {"metadata": {"annotations": said}})
        self._published = said
        if news:
            log.info("node %s: %s", self._name, said)

    def run(self, stop: threading.Event) -> None:
        """Look until ``stop`` is set."""
        backoff = Backoff()
        while not stop.is_set():
            try:
                self.look()
            except (MetadataError, ClusterError) as error:
                pause = backoff.pause()
                log.warning("node %s cannot be watched: %s; again in %.1f s", self._name, error, pause)
            else:
                backoff.reset()
                pause = INTERVAL_SECONDS
            stop.wait(pause)


def main(arguments: list[str] | None = None) -> None:
    """Watch one node until SIGTERM; settings from flags and environment."""
    try:
        config = read_node_config(arguments or [])
    except ConfigError as error:
        raise SystemExit(f"cloudoptim node-watch: {error}") from None
    logging.basicConfig(level=config.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("httpx", "httpcore", "urllib3", "kubernetes"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log.info("watching node %s", config.node_name)
    NodeWatch(config).run(stop)
