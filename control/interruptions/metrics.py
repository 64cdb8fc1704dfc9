"""Figures of the interruption path, on the worker's /metrics. No label carries a customer or node: such series grow
without bound, and the database answers those questions better. Pools are named for the scores of rebalance
recommendations alone, and only those with the most of them."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 90, 120, 180, 300, 600)

MESSAGES = Counter(
    "cloudoptim_intake_messages_total", "Messages committed, by source and what became of them", ["source", "outcome"]
)
DROPPED = Counter("cloudoptim_intake_dropped_total", "Messages that are not for us, by reason", ["reason"])
QUARANTINED = Counter("cloudoptim_intake_quarantined_total", "Messages kept in quarantine, by reason", ["reason"])
SECURITY_ALARMS = Counter(
    "cloudoptim_intake_security_alarms_total", "Messages that contradict the queue they came from", ["reason"]
)
COMMIT_SECONDS = Histogram("cloudoptim_intake_commit_seconds", "Length of the intake transaction", buckets=STEP_BUCKETS)
RECEIVE_LAG_SECONDS = Histogram(
    "cloudoptim_intake_lag_seconds", "From the event's own time to our commit", buckets=STEP_BUCKETS
)
QUEUES = Gauge("cloudoptim_intake_queues", "Customer queues polled by this process, by state", ["state"])
RECEIVERS = Gauge("cloudoptim_intake_receivers", "ReceiveMessage loops running in this process")
UNDELETED = Counter("cloudoptim_intake_undeleted_total", "Committed messages SQS did not delete; they come again")

STEP_SECONDS = Histogram(
    "cloudoptim_interruption_step_seconds",
    "From the notice of an interruption's sharpest signal to each step that followed it",
    ["step"],
    buckets=STEP_BUCKETS,
)
# Against the deadline: what was late lies at or below 0.
LEFT_BUCKETS = (-300, -60, -30, -10, 0, 5, 10, 20, 30, 45, 60, 75, 90, 105, 115, 120, 300, 900)
STEP_LEFT_SECONDS = Histogram(
    "cloudoptim_interruption_step_left_seconds",
    "From each step of an interruption to its deadline; at or below 0 is late",
    ["step"],
    buckets=LEFT_BUCKETS,
)
CLOSED = Counter("cloudoptim_interruptions_closed_total", "Interruptions closed, by outcome", ["outcome"])
OPEN = Gauge("cloudoptim_interruptions_open", "Interruptions that are not closed")

REBALANCES = Gauge(
    "cloudoptim_rebalance_recommendations",
    "Rebalance recommendations of the last 30 days, by pool and by whether an interruption followed within 30 minutes",
    ["instance_type", "availability_zone", "followed"],
)

LAUNCH_CALLS = Counter("cloudoptim_launch_calls_total", "RunInstances calls, by answer", ["answer"])
LAUNCH_MISMATCHES = Counter(
    "cloudoptim_launch_token_mismatches_total", "IdempotentParameterMismatch answers; must stay at 0"
)
LAUNCHED = Counter("cloudoptim_launch_instances_total", "Instances recorded, by how we learned of them", ["how"])
TERMINATED = Counter("cloudoptim_launch_terminated_total", "Instances of ours ended, by reason", ["reason"])
TROUBLED = Gauge(
    "cloudoptim_instances_in_trouble",
    "Instances of ours, by what people were told of: not to be ended, launched perhaps, never seen, adopted",
    ["kind"],
)
ALARMS = Counter("cloudoptim_alarms_total", "Things a person should look at, by kind", ["kind"])

RETURNS = Counter("cloudoptim_returns_to_spot_total", "Returns to Spot, by what became of them", ["status"])
LIFECYCLE = Counter("cloudoptim_lifecycle_hooks_total", "Answers to Auto Scaling lifecycle hooks", ["step"])

LOOP_SECONDS = Histogram(
    "cloudoptim_worker_loop_seconds", "Length of one round of a worker's loop", ["loop"], buckets=STEP_BUCKETS
)
LOOP_FAILURES = Counter("cloudoptim_worker_loop_failures_total", "Rounds that ended in an error", ["loop", "error"])
INVARIANT_VIOLATIONS = Gauge(
    "cloudoptim_invariant_violations", "Rows that break an invariant, found by the sweep", ["invariant"]
)
