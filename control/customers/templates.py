"""What a customer applies in its AWS account: trust policy, permissions, event rules and queue."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

MANAGED_TAG = "cloudoptim:managed"
# EventBridge's own limit per destination, and how long it tries before an event goes to the queue instead.
PUSHES_PER_SECOND = 300
PUSHED_FOR_SECONDS = 900

# EventBridge patterns of every event the intake understands (source, detail-type).
EVENT_PATTERNS: tuple[tuple[str, str], ...] = (
    ("aws.ec2", "EC2 Spot Instance Interruption Warning"),
    ("aws.ec2", "EC2 Instance Rebalance Recommendation"),
    ("aws.ec2", "EC2 Instance State-change Notification"),
    ("aws.ec2", "EC2 Capacity Reservation Instance Interruption Warning"),
    ("aws.ec2", "EC2 Interruptible Capacity Reservation Instance Interruption Warning"),
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


def _push() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Parameters, conditions and resources of the second way: the same events by HTTPS, for as long as both are given.
    What cannot be delivered within a quarter of an hour goes to the queue."""
    parameters = {
        "PushUrl": {
            "Type": "String",
            "Default": "",
            "Description": "Optional: https://<server>/api/v1/events/aws, to push events as well.",
        },
        "PushKey": {
            "Type": "String",
            "Default": "",
            "NoEcho": True,
            "Description": "With PushUrl: an API key of the role event_pusher (POST /api/v1/api-keys).",
        },
    }
    conditions = {"Push": {"Fn::Not": [{"Fn::Equals": [{"Ref": "PushUrl"}, ""]}]}}
    resources = {
        "PushConnection": {
            "Type": "AWS::Events::Connection",
            "Condition": "Push",
            "Properties": {
                "AuthorizationType": "API_KEY",
                "AuthParameters": {
                    "ApiKeyAuthParameters": {"ApiKeyName": "X-API-Key", "ApiKeyValue": {"Ref": "PushKey"}}
                },
            },
        },
        "PushDestination": {
            "Type": "AWS::Events::ApiDestination",
            "Condition": "Push",
            "Properties": {
                "ConnectionArn": {"Fn::GetAtt": ["PushConnection", "Arn"]},
                "InvocationEndpoint": {"Ref": "PushUrl"},
                "HttpMethod": "POST",
                "InvocationRateLimitPerSecond": PUSHES_PER_SECOND,
            },
        },
        "PushRole": {
            "Type": "AWS::IAM::Role",
            "Condition": "Push",
            "Properties": {
                "AssumeRolePolicyDocument": {
                    "Version": "2012-10-17",
                    "Statement": [
                        {
                            "Effect": "Allow",
                            "Principal": {"Service": "events.amazonaws.com"},
                            "Action": "sts:AssumeRole",
                        }
                    ],
                },
                "Policies": [
                    {
                        "PolicyName": "push",
                        "PolicyDocument": {
                            "Version": "2012-10-17",
                            "Statement": [
                                {
                                    "Effect": "Allow",
                                    "Action": "events:InvokeApiDestination",
                                    "Resource": {"Fn::GetAtt": ["PushDestination", "Arn"]},
                                }
                            ],
                        },
                    }
                ],
            },
        },
        "PushRule": {
            "Type": "AWS::Events::Rule",
            "Condition": "Push",
            "Properties": {
                "EventPattern": _pattern_of_all(),
                "Targets": [
                    {
                        "Id": "cloudoptim-push",
                        "Arn": {"Fn::GetAtt": ["PushDestination", "Arn"]},
                        "RoleArn": {"Fn::GetAtt": ["PushRole", "Arn"]},
                        "RetryPolicy": {"MaximumEventAgeInSeconds": PUSHED_FOR_SECONDS, "MaximumRetryAttempts": 185},
                        "DeadLetterConfig": {"Arn": {"Fn::GetAtt": ["Queue", "Arn"]}},
                    }
                ],
            },
        },
    }
    return parameters, conditions, resources


def _pattern_of_all() -> dict[str, list[str]]:
    return {
        "source": sorted({source for source, _ in EVENT_PATTERNS}),
        "detail-type": [detail_type for _, detail_type in EVENT_PATTERNS],
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
    parameters, conditions, push = _push()
    template = {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "CloudOptim: role, queue and event rules. Apply in every region with clusters.",
        "Parameters": parameters,
        "Conditions": conditions,
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
            **push,
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
    every = json.dumps(_pattern_of_all())
    return f"""data "aws_caller_identity" "this" {{}}

# Optional: push the same events by HTTPS as well, with an API key of the role event_pusher.
variable "push_url" {{
  type        = string
  default     = ""
  description = "https://<server>/api/v1/events/aws"
}}

variable "push_key" {{
  type      = string
  default   = ""
  sensitive = true
}}

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

resource "aws_cloudwatch_event_connection" "push" {{
  count              = var.push_url == "" ? 0 : 1
  name               = "cloudoptim-push"
  authorization_type = "API_KEY"
  auth_parameters {{
    api_key {{
      key   = "X-API-Key"
      value = var.push_key
    }}
  }}
}}

resource "aws_cloudwatch_event_api_destination" "push" {{
  count                            = var.push_url == "" ? 0 : 1
  name                             = "cloudoptim-push"
  connection_arn                   = aws_cloudwatch_event_connection.push[0].arn
  invocation_endpoint              = var.push_url
  http_method                      = "POST"
  invocation_rate_limit_per_second = {PUSHES_PER_SECOND}
}}

resource "aws_iam_role" "push" {{
  count = var.push_url == "" ? 0 : 1
  name  = "cloudoptim-push"
  assume_role_policy = jsonencode({{
    Version = "2012-10-17"
    Statement = [{{ Effect = "Allow", Principal = {{ Service = "events.amazonaws.com" }}, Action = "sts:AssumeRole" }}]
  }})
}}

resource "aws_iam_role_policy" "push" {{
  count = var.push_url == "" ? 0 : 1
  name  = "push"
  role  = aws_iam_role.push[0].id
  policy = jsonencode({{
    Version = "2012-10-17"
    Statement = [{{
      Effect   = "Allow"
      Action   = "events:InvokeApiDestination"
      Resource = aws_cloudwatch_event_api_destination.push[0].arn
    }}]
  }})
}}

resource "aws_cloudwatch_event_rule" "push" {{
  count         = var.push_url == "" ? 0 : 1
  name          = "cloudoptim-push"
  event_pattern = <<-JSON
  {every}
  JSON
}}

# What cannot be delivered goes to the queue.
resource "aws_cloudwatch_event_target" "push" {{
  count    = var.push_url == "" ? 0 : 1
  rule     = aws_cloudwatch_event_rule.push[0].name
  arn      = aws_cloudwatch_event_api_destination.push[0].arn
  role_arn = aws_iam_role.push[0].arn
  retry_policy {{
    maximum_event_age_in_seconds = {PUSHED_FOR_SECONDS}
    maximum_retry_attempts       = 185
  }}
  dead_letter_config {{ arn = aws_sqs_queue.cloudoptim.arn }}
}}

output "role_arn" {{ value = aws_iam_role.cloudoptim.arn }}
output "queue_url" {{ value = aws_sqs_queue.cloudoptim.url }}
"""


def _indented(document: dict[str, Any]) -> str:
    return "\n".join("  " + line for line in json.dumps(document, indent=2).splitlines())
