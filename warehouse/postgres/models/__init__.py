"""All models, so that importing this package fills ``Base.metadata``."""

from warehouse.postgres.models.base import Base, new_id
from warehouse.postgres.models.clusters import Cluster, Node
from warehouse.postgres.models.customers import Customer, CustomerConfig, IntakeHealth
from warehouse.postgres.models.gaps import DataGap, GapFill, PartitionCoverage, SourceFailure
from warehouse.postgres.models.interruptions import (
    AdoptedInstance,
    InboxMessage,
    Interruption,
    InterruptionHistory,
    LaunchAttempt,
    LaunchBatch,
    LaunchIntent,
    LaunchTemplate,
    LifecycleAction,
    PoolStanding,
    RefusedEnding,
    RoundClaim,
    SpotEventRecord,
)
from warehouse.postgres.models.lake import LakeRelease
from warehouse.postgres.models.metrics import DirtyPartition, MetricBatch, MetricSample, MetricsSummary
from warehouse.postgres.models.optimization import OptimizationHistory, PlanHistory, PlanStep
from warehouse.postgres.models.outbox import Notification, Outbox
from warehouse.postgres.models.people import ApiKey, AuditLog, User, UserSession
from warehouse.postgres.models.predictions import MlModel, PredictionRecord
from warehouse.postgres.models.prices import OnDemandPrice, SpotPriceCurrent
from warehouse.postgres.models.statements import SavingsStatement
from warehouse.postgres.models.tasks import AgentTask, TaskReport

__all__ = [
    "AdoptedInstance",
    "AgentTask",
    "ApiKey",
    "AuditLog",
    "Base",
    "Cluster",
    "Customer",
    "CustomerConfig",
    "DataGap",
    "DirtyPartition",
    "GapFill",
    "InboxMessage",
    "IntakeHealth",
    "Interruption",
    "InterruptionHistory",
    "LakeRelease",
    "LaunchAttempt",
    "LaunchBatch",
    "LaunchIntent",
    "LaunchTemplate",
    "LifecycleAction",
    "MetricBatch",
    "MetricSample",
    "MetricsSummary",
    "MlModel",
    "Node",
    "Notification",
    "OnDemandPrice",
    "OptimizationHistory",
    "Outbox",
    "PartitionCoverage",
    "PlanHistory",
    "PlanStep",
    "PoolStanding",
    "PredictionRecord",
    "RefusedEnding",
    "RoundClaim",
    "SavingsStatement",
    "SourceFailure",
    "SpotEventRecord",
    "SpotPriceCurrent",
    "TaskReport",
    "User",
    "UserSession",
    "new_id",
]
