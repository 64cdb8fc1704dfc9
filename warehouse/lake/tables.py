"""All tables of the lake: columns with types and units, keys, partitions and sort order (SPEC.md §2.2).

Money is ``decimal128(18, 8)``, the same as Postgres' ``NUMERIC(18,8)``: sums do not depend on the order a parallel
engine adds them in, so a statement computed twice is the same to the cent. Metric values are ``float64`` in base units
(cores, bytes, ratio). Every time is UTC with microseconds. ``day`` is the UTC day of the table's time column.

A table whose rows belong to customers carries ``customer_id``. Where that may be null, the row belongs to nobody, and
only tables marked ``shared_when_null`` (rows about pools and prices) show such rows to every customer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from warehouse.lake.errors import LakeDataError

TIMESTAMP = pa.timestamp("us", tz="UTC")
MONEY = pa.decimal128(18, 8)
TEXT = pa.string()
FLOAT = pa.float64()
COUNT = pa.int64()
DAY = pa.date32()
BOOL = pa.bool_()

# Values become folder names and delta-rs encodes anything else in two different ways (its paths of added and removed
# files then disagree, and vacuum misses the file).
PARTITION_TEXT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
_IDENTIFIER = re.compile(r"^[a-z][a-z0-9_]{0,62}$")


class Source(StrEnum):
    """Where a row comes from. Anything but ``observed`` says that the row was not seen when it happened."""

    OBSERVED = "observed"
    AWS_HISTORY = "aws_history"
    PROMETHEUS = "prometheus"
    THANOS = "thanos"
    CLOUDWATCH = "cloudwatch"
    ML_SERVER = "ml_server"
    INTERPOLATED = "interpolated"

    @property
    def measured(self) -> bool:
        """True when somebody measured the value (then or fetched later): only such rows may grade predictions."""
        return self not in (Source.ML_SERVER, Source.INTERPOLATED)

    @property
    def rank(self) -> int:
        """Which of two rows with one key stays: observed over refetched over made up."""
        return {Source.OBSERVED: 3, Source.ML_SERVER: 1, Source.INTERPOLATED: 0}.get(self, 2)


@dataclass(frozen=True, slots=True)
class Column:
    """One column. ``required`` columns are never null; the others may be left out by a writer."""

    name: str
    type: pa.DataType
    description: str
    required: bool = True

    def field(self) -> pa.Field:
        """The Arrow field."""
        return pa.field(self.name, self.type, nullable=not self.required)


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One lake table.

    Attributes:
        columns: data columns followed by the partition columns, in the order queries see them.
        partition_by: partition columns; replacing is always by whole partitions.
        sort_by: order of rows inside a file, so that statistics and ASOF joins can skip.
        keys: what makes a row unique inside the table.
        time_column: the column whose UTC day is ``day``; None where the writer gives ``day`` itself.
        shared_when_null: rows without a customer may be read by every customer.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    keys: tuple[str, ...]
    sort_by: tuple[str, ...]
    partition_by: tuple[str, ...] = ("day",)
    time_column: str | None = "ts"
    shared_when_null: bool = False

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        for name in (*self.keys, *self.sort_by, *self.partition_by, *((self.time_column,) if self.time_column else ())):
            if name not in names:
                raise ValueError(f"table {self.name}: {name!r} is not one of its columns")
        for name in (self.name, *names):
            if not _IDENTIFIER.match(name):
                raise ValueError(f"table {self.name}: {name!r} is not a plain lower-case name")

    def schema(self) -> pa.Schema:
        """Arrow schema of the table, partition columns included."""
        return pa.schema([column.field() for column in self.columns])

    @property
    def tenant(self) -> bool:
        """True when rows belong to customers."""
        return any(column.name == "customer_id" for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(column.name for column in self.columns)


def _c(name: str, type_: pa.DataType, description: str) -> Column:
    return Column(name, type_, description)


def _opt(name: str, type_: pa.DataType, description: str) -> Column:
    return Column(name, type_, description, required=False)


DAY_COLUMN = _c("day", DAY, "UTC day, the partition")
REGION_COLUMN = _c("region", TEXT, "AWS region, e.g. us-east-1")
CUSTOMER = _c("customer_id", TEXT, "customer, UUID as text")
CLUSTER = _c("cluster_id", TEXT, "cluster, UUID as text")
SOURCE = _c("source", TEXT, "one of " + ", ".join(Source))
FETCHED_AT = _c("fetched_at", TIMESTAMP, "when we received it")
FILL = (
    _opt("fill_run_id", TEXT, "run that filled this row; null when observed"),
    _opt("fill_method", TEXT, "how a filled value was made, e.g. refetch, linear, last_value"),
    _opt("filled_at", TIMESTAMP, "when the row was filled; null when observed"),
)
POOL = (
    _c("zone_id", TEXT, "availability zone id, the same place in every account, e.g. use1-az1"),
    _opt("availability_zone", TEXT, "zone name in the asking account; names differ between accounts"),
    _c("instance_type", TEXT, "e.g. m5.large"),
)

_TABLES = (
    TableSpec(
        "spot_prices",
        "Every change of a Spot price: the price holds from ts until the pool's next row.",
        (
            _c("ts", TIMESTAMP, "when the price took effect, or was seen where only snapshots exist"),
            *POOL,
            _c("product", TEXT, "product description, e.g. Linux/UNIX"),
            _c("price_usd_per_hour", MONEY, "Spot price, USD per instance hour"),
            SOURCE,
            FETCHED_AT,
            *FILL,
            DAY_COLUMN,
            REGION_COLUMN,
        ),
        keys=("region", "zone_id", "instance_type", "product", "ts"),
        sort_by=("instance_type", "zone_id", "product", "ts"),
        partition_by=("day", "region"),
    ),
    TableSpec(
        "on_demand_prices",
        "Every change of an on-demand price: the price holds from ts until the type's next row.",
        (
            _c("ts", TIMESTAMP, "when the price took effect or was first seen"),
            _c("instance_type", TEXT, "e.g. m5.large"),
            _c("product", TEXT, "product description in Spot's words, e.g. Linux/UNIX"),
            _c("price_usd_per_hour", MONEY, "list price, USD per instance hour"),
            _opt("cpu_cores", FLOAT, "vCPUs of the type"),
            _opt("memory_bytes", COUNT, "memory of the type, bytes"),
            _opt("sku", TEXT, "SKU in the price list"),
            SOURCE,
            FETCHED_AT,
            *FILL,
            DAY_COLUMN,
            REGION_COLUMN,
        ),
        keys=("region", "instance_type", "product", "ts"),
        sort_by=("instance_type", "product", "ts"),
        partition_by=("day", "region"),
    ),
    TableSpec(
        "metric_5m",
        "Agents' metrics in windows of five minutes, in base units (cores, bytes, ratio, count).",
        (
            _c("ts", TIMESTAMP, "start of the five-minute window"),
            CUSTOMER,
            CLUSTER,
            _opt("node_name", TEXT, "node when the subject is one"),
            _c("subject", TEXT, "node name, namespace/kind/name of a workload, or cluster name"),
            _c("metric", TEXT, "name with its unit, e.g. node_cpu_usage_cores"),
            _opt("min", FLOAT, "smallest sample of the window"),
            _opt("mean", FLOAT, "mean of the samples"),
            _opt("max", FLOAT, "largest sample"),
            _opt("last", FLOAT, "last sample"),
            _c("samples", COUNT, "number of samples; 0 when the window was filled"),
            SOURCE,
            *FILL,
            DAY_COLUMN,
        ),
        keys=("customer_id", "cluster_id", "metric", "subject", "ts"),
        sort_by=("customer_id", "cluster_id", "metric", "subject", "ts"),
    ),
    TableSpec(
        "node_hours",
        "How many minutes of each hour each node ran, and as what.",
        (
            _c("ts", TIMESTAMP, "start of the hour"),
            CUSTOMER,
            CLUSTER,
            _c("node_name", TEXT, "Kubernetes node name"),
            _c("instance_id", TEXT, "EC2 instance id"),
            *POOL,
            _c("product", TEXT, "product description, e.g. Linux/UNIX"),
            _c("lifecycle", TEXT, "spot or on-demand"),
            _c("minutes", FLOAT, "minutes the node ran in this hour, 0 to 60"),
            _opt("cpu_cores", FLOAT, "cores of the node"),
            _opt("memory_bytes", COUNT, "memory of the node, bytes"),
            SOURCE,
            DAY_COLUMN,
            REGION_COLUMN,
        ),
        keys=("customer_id", "cluster_id", "instance_id", "ts"),
        sort_by=("customer_id", "cluster_id", "instance_id", "ts"),
        partition_by=("day", "region"),
    ),
    TableSpec(
        "node_cost_hourly",
        "What each node cost in each hour at the price of that hour, beside the same minutes on demand (B1 list).",
        (
            _c("ts", TIMESTAMP, "start of the hour"),
            CUSTOMER,
            CLUSTER,
            _c("node_name", TEXT, "Kubernetes node name"),
            _c("instance_id", TEXT, "EC2 instance id"),
            *POOL,
            _c("lifecycle", TEXT, "spot or on-demand"),
            _c("minutes", FLOAT, "minutes the node ran in this hour"),
            _opt("price_usd_per_hour", MONEY, "price paid; null when no price is known for the hour"),
            _opt("on_demand_usd_per_hour", MONEY, "list price of the type in the region at that hour"),
            _opt("actual_usd", MONEY, "minutes/60 x price paid"),
            _opt("b1_list_usd", MONEY, "minutes/60 x list price: baseline B1"),
            _c("price_basis", TEXT, "data_feed, spot_as_of, on_demand or missing"),
            SOURCE,
            DAY_COLUMN,
            REGION_COLUMN,
        ),
        keys=("customer_id", "cluster_id", "instance_id", "ts"),
        sort_by=("customer_id", "cluster_id", "ts", "instance_id"),
        partition_by=("day", "region"),
    ),
    TableSpec(
        "cluster_cost_hourly",
        "What each cluster cost in each hour, its three baselines, and how much of the hour is covered by data.",
        (
            _c("ts", TIMESTAMP, "start of the hour"),
            CUSTOMER,
            CLUSTER,
            _opt("region", TEXT, "region of the cluster"),
            _opt("actual_usd", MONEY, "cost of all nodes; null when nothing of the hour is covered"),
            _opt("spot_usd", MONEY, "part of the cost paid for Spot nodes"),
            _opt("on_demand_usd", MONEY, "part of the cost paid for on-demand nodes"),
            _opt("b1_list_usd", MONEY, "B1 list: the same machines on demand"),
            _opt("b2_shape_usd", MONEY, "B2 shape: the machines we replaced, had they stayed, scaled by demand"),
            _opt("b3_commit_usd", MONEY, "B3 commit: B1 with hours under commitments at no marginal price"),
            _c("node_count", COUNT, "nodes that ran in the hour"),
            _c("node_minutes", FLOAT, "minutes of all nodes"),
            _c("spot_minutes", FLOAT, "minutes of Spot nodes"),
            _c("coverage_ratio", FLOAT, "priced node minutes / node minutes, 0 to 1"),
            _c("complete", BOOL, "the hour is over and nothing in it is missing"),
            SOURCE,
            DAY_COLUMN,
        ),
        keys=("customer_id", "cluster_id", "ts"),
        sort_by=("customer_id", "cluster_id", "ts"),
    ),
    TableSpec(
        "savings_daily",
        "Savings of each cluster and day against each named baseline; negative savings are kept.",
        (
            CUSTOMER,
            CLUSTER,
            _c("baseline", TEXT, "b1_list, b2_shape or b3_commit"),
            _c("stage", TEXT, "estimated or realised"),
            _c("baseline_usd", MONEY, "cost of the baseline over covered hours"),
            _c("actual_usd", MONEY, "cost over the same hours"),
            _c("gross_usd", MONEY, "baseline - actual"),
            _c(
                "overlap_usd",
                MONEY,
                "list value of minutes in which a node and its replacement both ran: B1 counts both",
            ),
            _c("fallback_premium_usd", MONEY, "paid for on-demand hours where Spot was planned"),
            _opt("displaced_commitment_usd", MONEY, "commitments left unused; null: no commitments are known"),
            _opt("rework_usd", MONEY, "work repeated after interruptions; null: nobody measures it"),
            _c("net_usd", MONEY, "gross less the deductions that are known"),
            _c("hours_covered", COUNT, "complete hours counted"),
            _c("coverage_ratio", FLOAT, "covered / expected hours, 0 to 1"),
            SOURCE,
            DAY_COLUMN,
        ),
        keys=("customer_id", "cluster_id", "baseline", "day"),
        sort_by=("customer_id", "cluster_id", "baseline"),
        time_column=None,
    ),
    TableSpec(
        "interruptions",
        "Every interruption from its notice to its end.",
        (
            _c("ts", TIMESTAMP, "when the notice was received"),
            CUSTOMER,
            CLUSTER,
            _c("interruption_id", TEXT, "UUID as text"),
            _c("instance_id", TEXT, "EC2 instance id"),
            _opt("node_name", TEXT, "Kubernetes node name"),
            *POOL,
            _opt("region", TEXT, "region of the instance"),
            _c("kind", TEXT, "kind of event, e.g. spot_interruption"),
            _opt("deadline_at", TIMESTAMP, "when the instance ends"),
            _opt("task_created_at", TIMESTAMP, "drain task created"),
            _opt("cordoned_at", TIMESTAMP, "node cordoned"),
            _opt("drained_at", TIMESTAMP, "node drained"),
            _opt("replacement_ready_at", TIMESTAMP, "replacement node Ready"),
            _opt("closed_at", TIMESTAMP, "interruption closed"),
            _opt("ended_at", TIMESTAMP, "when the interrupted instance was gone"),
            _opt("replacement_instance_id", TEXT, "instance launched instead"),
            _opt("replacement_launched_at", TIMESTAMP, "when that instance began to cost money"),
            _c("state", TEXT, "state of the interruption when this row was written"),
            _opt("outcome", TEXT, "how it ended, null while open"),
            _opt("lifecycle", TEXT, "how the interrupted instance was bought: spot or on-demand"),
            SOURCE,
            DAY_COLUMN,
        ),
        keys=("interruption_id",),
        sort_by=("customer_id", "cluster_id", "ts"),
    ),
    TableSpec(
        "interruption_exposure",
        "Instance hours at risk per pool and hour, with the interruptions and the ends that were ours (censored).",
        (
            _c("ts", TIMESTAMP, "start of the hour"),
            CUSTOMER,
            *POOL,
            _c("instance_hours", FLOAT, "hours Spot instances ran in the pool"),
            _c("interruptions", COUNT, "instances AWS took"),
            _c("censored", COUNT, "instances we ended ourselves: neither survived nor interrupted"),
            SOURCE,
            DAY_COLUMN,
            REGION_COLUMN,
        ),
        keys=("customer_id", "region", "zone_id", "instance_type", "ts"),
        sort_by=("instance_type", "zone_id", "ts"),
        partition_by=("day", "region"),
    ),
    TableSpec(
        "predictions",
        "What was predicted, before it could be known. Rows without a customer are about pools.",
        (
            _c("ts", TIMESTAMP, "when the prediction was made"),
            _c("prediction_id", TEXT, "UUID as text"),
            _opt("customer_id", TEXT, "customer, null for pools"),
            _opt("cluster_id", TEXT, "cluster, null for pools"),
            _c("kind", TEXT, "interruption_rate, savings or resource_usage"),
            _c("subject", TEXT, "pool, optimisation, cluster or workload"),
            _c("window_start", TIMESTAMP, "start of the predicted window"),
            _c("window_end", TIMESTAMP, "end of the predicted window"),
            _c("value", FLOAT, "predicted value in the unit of its kind"),
            _opt("lower", FLOAT, "lower end of the interval"),
            _opt("upper", FLOAT, "upper end of the interval"),
            _opt("unit", TEXT, "unit of the value"),
            _c("model_version", TEXT, "model that made it"),
            _c("made_by", TEXT, "ml_server or advisor"),
            DAY_COLUMN,
        ),
        keys=("prediction_id",),
        sort_by=("kind", "subject", "ts"),
        shared_when_null=True,
    ),
    TableSpec(
        "prediction_scores",
        "Each prediction beside what happened, graded when its window closed. Day is the day the window closed.",
        (
            _c("window_end", TIMESTAMP, "end of the predicted window"),
            _c("prediction_id", TEXT, "UUID as text"),
            _opt("customer_id", TEXT, "customer, null for pools"),
            _opt("cluster_id", TEXT, "cluster, null for pools"),
            _c("kind", TEXT, "interruption_rate, savings or resource_usage"),
            _c("subject", TEXT, "pool, optimisation, cluster or workload"),
            _c("model_version", TEXT, "model that made it"),
            _c("predicted", FLOAT, "predicted value"),
            _opt("actual", FLOAT, "what happened; null when censored or not covered"),
            _opt("error", FLOAT, "predicted - actual"),
            _opt("exposure", FLOAT, "weight, e.g. instance hours"),
            _opt("base_rate", FLOAT, "what the pool's long-run rate would have said"),
            _opt("score", FLOAT, "score of this prediction, e.g. Brier"),
            _c("censored", COUNT, "events that could not be observed to their end"),
            _c("coverage_ratio", FLOAT, "observed share of the window, 0 to 1"),
            _c("scored_at", TIMESTAMP, "when it was graded"),
            DAY_COLUMN,
        ),
        keys=("prediction_id",),
        sort_by=("kind", "model_version", "subject", "window_end"),
        time_column="window_end",
        shared_when_null=True,
    ),
    TableSpec(
        "optimizations",
        "Every optimisation with its estimate and, later, its realised savings.",
        (
            _c("ts", TIMESTAMP, "when it was requested"),
            CUSTOMER,
            CLUSTER,
            _c("optimization_id", TEXT, "UUID as text"),
            _c("optimization_type", TEXT, "spot_optimize, bin_pack or rightsize"),
            _c("status", TEXT, "status when this row was written"),
            _opt("made_by", TEXT, "ml_server or advisor"),
            _opt("model_version", TEXT, "model that recommended it"),
            _opt("estimated_usd_per_hour", MONEY, "estimated savings per hour"),
            _opt("realised_usd_per_hour", MONEY, "realised savings per hour; null until enough full days"),
            _opt("executed_at", TIMESTAMP, "when its steps began"),
            _opt("finished_at", TIMESTAMP, "when its last step ended"),
            _c("dry_run", BOOL, "true when nothing was changed"),
            DAY_COLUMN,
        ),
        keys=("optimization_id",),
        sort_by=("customer_id", "cluster_id", "ts"),
    ),
    TableSpec(
        "events",
        "Every distinct event received, from any source. Rows without a customer are for operators.",
        (
            _c("ts", TIMESTAMP, "when it was received"),
            _c("event_id", TEXT, "UUID as text"),
            _opt("customer_id", TEXT, "customer; null when nobody owns it"),
            _opt("cluster_id", TEXT, "cluster"),
            _c("event_type", TEXT, "e.g. spot_interruption"),
            _opt("instance_id", TEXT, "EC2 instance id"),
            _opt("region", TEXT, "region of the event"),
            _opt("occurred_at", TIMESTAMP, "when it happened, by its sender"),
            _c("received_from", TEXT, "sqs, push, agent or poll"),
            _opt("action_taken", TEXT, "what was done about it"),
            _opt("payload", TEXT, "the event as received, JSON"),
            SOURCE,
            DAY_COLUMN,
        ),
        keys=("event_id",),
        sort_by=("customer_id", "ts"),
    ),
    TableSpec(
        "gap_ledger",
        "What is or was missing, why, and what filled it. Rows without a customer are about prices.",
        (
            _c("ts", TIMESTAMP, "start of the gap"),
            _c("gap_id", TEXT, "UUID as text"),
            _opt("customer_id", TEXT, "customer, null for prices"),
            _opt("cluster_id", TEXT, "cluster, null for prices"),
            _c("series", TEXT, "table and series the gap is in"),
            _c("gap_end", TIMESTAMP, "end of the gap"),
            _c(
                "reason",
                TEXT,
                "no_scrape, agent_away, api_error, denied, not_configured, not_needed, did_not_exist, too_old",
            ),
            _c("expected_points", COUNT, "points the grid expects in the gap"),
            _c("filled_points", COUNT, "points filled so far"),
            _opt("fill_source", TEXT, "one of " + ", ".join(Source)),
            _opt("fill_run_id", TEXT, "run that filled it"),
            _opt("filled_at", TIMESTAMP, "when it was filled"),
            _c("found_at", TIMESTAMP, "when it was found"),
            DAY_COLUMN,
        ),
        keys=("gap_id",),
        sort_by=("series", "ts"),
        shared_when_null=True,
    ),
)

TABLES: dict[str, TableSpec] = {spec.name: spec for spec in _TABLES}


def duckdb_type(type_: pa.DataType) -> str:
    """DuckDB's name of an Arrow type the lake uses.

    Raises:
        LakeDataError: the lake does not hold such columns.
    """
    simple = {
        pa.string(): "VARCHAR",
        pa.int64(): "BIGINT",
        pa.int32(): "INTEGER",
        pa.float64(): "DOUBLE",
        pa.bool_(): "BOOLEAN",
        pa.date32(): "DATE",
        pa.timestamp("us", tz="UTC"): "TIMESTAMP WITH TIME ZONE",
    }
    if type_ in simple:
        return simple[type_]
    if pa.types.is_decimal(type_):
        return f"DECIMAL({type_.precision}, {type_.scale})"
    raise LakeDataError(f"lake columns cannot be {type_}; use one of {', '.join(map(str, simple))} or a decimal")
