"""What a customer applies in its AWS account: trust policy, permissions, event rules and queue."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

MANAGED_TAG = "cloudoptim:managed"

# EventBridge patterns of every event the intake understands (source, detail-type).
EVENT_PATTERNS: tuple[tuple[str, str], ...] = (
    ("aws.ec2", "EC2 Spot Instance Interruption Warning"),
    ("aws.ec2", "EC2 Instance Rebalance Recommendation"),
    ("aws.ec2", "EC2 Instance State-change Notification"),
    ("aws.ec2", "EC2 Capacity Reservation Instance Interruption Warning"),
    ("aws.health", "AWS Health Event"),
    ("aws.autoscaling", "EC2 Instance-terminate Lifecycle Action"),
    ("aws.autoscaling", "EC2 Instance-launch Lifecycle Action"),
    ("aws.autoscaling", "EC2 Instance Launch Unsuccessful"),
)


def trust_policy(server_account: str, external_id: UUID) -> dict[str, Any]:
    """Who may assume the role: our account, and only with the customer's own external id."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"AWS": f"arn:aws:iam::{server_account or 'SERVER_ACCOUNT_ID'}:root"},
                "Action": "sts:AssumeRole",
                "Condition": {"StringEquals": {"sts:ExternalId": str(external_id)}},
            }
        ],
    }


def iam_policy(account_id: str | None, queue_name: str, deployment_id: str) -> dict[str, Any]:
    """What the role may do. Instances may be ended only when they carry this deployment's tag from their launch."""
    account = account_id or "*"
    tagged = {"StringEquals": {f"aws:RequestTag/{MANAGED_TAG}": deployment_id}}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "Read",
                "Effect": "Allow",
                "Action": [
                    "ec2:Describe*",
                    "pricing:GetProducts",
                    "cloudwatch:GetMetricData",
                    "autoscaling:Describe*",
                ],
                "Resource": "*",
            },
            {
                "Sid": "Queue",
                "Effect": "Allow",
                "Action": [
                    "sqs:ReceiveMessage",
                    "sqs:DeleteMessage",
                    "sqs:ChangeMessageVisibility",
                    "sqs:GetQueueAttributes",
                ],
                "Resource": f"arn:aws:sqs:*:{account}:{queue_name}",
            },
            {
                "Sid": "LaunchTagged",
                "Effect": "Allow",
                "Action": "ec2:RunInstances",
                "Resource": [f"arn:aws:ec2:*:{account}:instance/*"],
                "Condition": tagged,
            },
            {
                "Sid": "LaunchParts",
                "Effect": "Allow",
                "Action": "ec2:RunInstances",
                "Resource": [
                    "arn:aws:ec2:*::image/*",
                    *(
                        f"arn:aws:ec2:*:{account}:{part}/*"
                        for part in ("subnet", "network-interface", "security-group", "volume", "key-pair")
                    ),
                ],
            },
            {
                "Sid": "TagAtLaunch",
                "Effect": "Allow",
                "Action": "ec2:CreateTags",
                "Resource": f"arn:aws:ec2:*:{account}:*/*",
                "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
            },
            {
                "Sid": "EndOwn",
                "Effect": "Allow",
                "Action": "ec2:TerminateInstances",
                "Resource": f"arn:aws:ec2:*:{account}:instance/*",
                "Condition": {"StringEquals": {f"aws:ResourceTag/{MANAGED_TAG}": deployment_id}},
            },
            {
                "Sid": "PassNodeRole",
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": f"arn:aws:iam::{account}:role/*",
                "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            },
            {
                "Sid": "Lifecycle",
                "Effect": "Allow",
                "Action": ["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"],
                "Resource": "*",
            },
        ],
    }


def cloudformation(trust: dict[str, Any], permissions: dict[str, Any], queue_name: str) -> str:
    """A stack with role, queue, queue policy and rules (JSON, which CloudFormation reads as well as YAML)."""
    rules = {
        f"Rule{number}": {
            "Type": "AWS::Events::Rule",
            "Properties": {
                "EventPattern": {"source": [source], "detail-type": [detail_type]},
                "Targets": [{"Id": "cloudoptim", "Arn": {"Fn::GetAtt": ["Queue", "Arn"]}}],
            },
        }
        for number, (source, detail_type) in enumerate(EVENT_PATTERNS, 1)
    }
    template = {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "CloudOptim: role, queue and event rules. Apply in every region with clusters.",
        "Resources": {
            "Role": {
                "Type": "AWS::IAM::Role",
                "Properties": {
                    "RoleName": "cloudoptim",
                    "MaxSessionDuration": 3600,
                    "AssumeRolePolicyDocument": trust,
                    "Policies": [{"PolicyName": "cloudoptim", "PolicyDocument": permissions}],
                },
            },
            "Queue": {
                "Type": "AWS::SQS::Queue",
                "Properties": {
                    "QueueName": queue_name,
                    "MessageRetentionPeriod": 345600,
                    "VisibilityTimeout": 20,
                    "SqsManagedSseEnabled": True,
                },
            },
            "QueuePolicy": {
                "Type": "AWS::SQS::QueuePolicy",
                "Properties": {
                    "Queues": [{"Ref": "Queue"}],
                    "PolicyDocument": {
                        "Version": "2012-10-17",
                        "Statement": [
                            {
                                "Effect": "Allow",
                                "Principal": {"Service": ["events.amazonaws.com", "sqs.amazonaws.com"]},
                                "Action": "sqs:SendMessage",
                                "Resource": {"Fn::GetAtt": ["Queue", "Arn"]},
                                "Condition": {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}},
                            }
                        ],
                    },
                },
            },
            **rules,
        },
        "Outputs": {
            "RoleArn": {"Value": {"Fn::GetAtt": ["Role", "Arn"]}},
            "QueueUrl": {"Value": {"Ref": "Queue"}},
        },
    }
    return json.dumps(template, indent=2)


def terraform(trust: dict[str, Any], permissions: dict[str, Any], queue_name: str) -> str:
    """The same for Terraform."""
    rules = "\n".join(
        f'  "{number}" = {{ source = "{source}", detail_type = "{detail_type}" }}'
        for number, (source, detail_type) in enumerate(EVENT_PATTERNS, 1)
    )
    return f"""data "aws_caller_identity" "this" {{}}

locals {{
  events = {{
{rules}
  }}
}}

resource "aws_iam_role" "cloudoptim" {{
  name                 = "cloudoptim"
  max_session_duration = 3600
  assume_role_policy   = <<-JSON
{_indented(trust)}
  JSON
}}

resource "aws_iam_role_policy" "cloudoptim" {{
  name   = "cloudoptim"
  role   = aws_iam_role.cloudoptim.id
  policy = <<-JSON
{_indented(permissions)}
  JSON
}}

resource "aws_sqs_queue" "cloudoptim" {{
  name                       = "{queue_name}"
  message_retention_seconds  = 345600
  visibility_timeout_seconds = 20
  sqs_managed_sse_enabled    = true
}}

resource "aws_sqs_queue_policy" "cloudoptim" {{
  queue_url = aws_sqs_queue.cloudoptim.url
  policy = jsonencode({{
    Version = "2012-10-17"
    Statement = [{{
      Effect    = "Allow"
      Principal = {{ Service = ["events.amazonaws.com", "sqs.amazonaws.com"] }}
      Action    = "sqs:SendMessage"
      Resource  = aws_sqs_queue.cloudoptim.arn
      Condition = {{ StringEquals = {{ "aws:SourceAccount" = data.aws_caller_identity.this.account_id }} }}
    }}]
  }})
}}

resource "aws_cloudwatch_event_rule" "cloudoptim" {{
  for_each      = local.events
  name          = "cloudoptim-${{each.key}}"
  event_pattern = jsonencode({{ source = [each.value.source], "detail-type" = [each.value.detail_type] }})
}}

resource "aws_cloudwatch_event_target" "cloudoptim" {{
  for_each = local.events
  rule     = aws_cloudwatch_event_rule.cloudoptim[each.key].name
  arn      = aws_sqs_queue.cloudoptim.arn
}}

output "role_arn" {{ value = aws_iam_role.cloudoptim.arn }}
output "queue_url" {{ value = aws_sqs_queue.cloudoptim.url }}
"""


def _indented(document: dict[str, Any]) -> str:
    return "\n".join("  " + line for line in json.dumps(document, indent=2).splitlines())
