"""Accounts, their cross-account roles, and credentials that say whose they are.

Session tokens carry their content signed with a key of this sandbox, so that nothing needs to be remembered and
credentials survive a restart. Request signatures are not verified: the token and the key id decide who calls.
"""

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any
from xml.sax.saxutils import escape

import msgspec

from control.sandbox.aws.protocol import STS_NAMESPACE, Answer, AwsError, Call, Caller, query_answer, timestamp
from control.sandbox.aws.storage import Storage


@dataclass(slots=True)
class Account:
    """One customer's account. `revoked` stands for the customer having removed our role."""

    account_id: str
    role_arn: str
    external_id: str
    queue_url: str
    region: str
    revoked: bool = False
    generation: int = 0
    """Session tokens of an older generation have expired."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What boto3 takes: `aws_access_key_id`, `aws_secret_access_key`, a session token or None."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None

    def boto3(self) -> dict[str, str]:
        """Keyword arguments for boto3.client(...) or boto3.Session(...)."""
        named = {
            "aws_access_key_id": self.access_key_id,
            "aws_secret_access_key": self.secret_access_key,
        }
        return named if self.session_token is None else {**named, "aws_session_token": self.session_token}

    def __repr__(self) -> str:
        return f"Credentials({self.access_key_id})"


class Accounts:
    """Who exists and who calls."""

    def __init__(self, storage: Storage, platform_account_id: str) -> None:
        self._storage = storage
        self.platform_account_id = platform_account_id
        meta = dict(storage.all("meta"))
        self._key = bytes.fromhex(meta["signing_key"]) if "signing_key" in meta else secrets.token_bytes(32)
        storage.put("meta", "signing_key", self._key.hex())
        self.by_id: dict[str, Account] = {key: Account(**row) for key, row in storage.all("account")}
        self._static: dict[str, str] = {self._static_key_id(i): i for i in [platform_account_id, *self.by_id]}

    def add(self, account: Account) -> Account:
        self.by_id[account.account_id] = account
        self._static[self._static_key_id(account.account_id)] = account.account_id
        self.save(account)
        return account

    def save(self, account: Account) -> None:
        self._storage.put("account", account.account_id, asdict(account))

    def credentials(self, account_id: str) -> Credentials:
        """Long-lived keys of an account's own administrator (or of the platform itself)."""
        return Credentials(self._static_key_id(account_id), self._digest("secret", account_id)[:40])

    def caller(self, service: str, access_key_id: str, token: str | None) -> Caller:
        """Who signed with this key; raises AwsError for a token that is unknown, expired or revoked."""
        if token is None:
            if access_key_id.startswith("ASIA"):
                raise AwsError(*_INVALID[service == "ec2"], 403)
            account_id = self._static.get(access_key_id, self.platform_account_id)
            return Caller(account_id, f"arn:aws:iam::{account_id}:user/admin", access_key_id)
        session = self._open(token)
        if session is None or session["key"] != access_key_id:
            raise AwsError(*_INVALID[service == "ec2"], 403)
        account = self.by_id.get(session["account"])
        if account is None or account.revoked:
            raise AwsError(
                "UnauthorizedOperation" if service == "ec2" else "AccessDenied",
                f"The role {session['role']} no longer exists or no longer trusts the caller.",
                403,
            )
        if session["expires"] <= time.time() or session["generation"] != account.generation:
            code = "RequestExpired" if service == "ec2" else "ExpiredToken"
            raise AwsError(
                code, "The security token included in the request is expired", 400 if service == "ec2" else 403
            )
        role_name = session["role"].rpartition("/")[2]
        arn = f"arn:aws:sts::{account.account_id}:assumed-role/{role_name}/{session['session']}"
        return Caller(account.account_id, arn, access_key_id, session["session"])

    def assume_role(self, call: Call) -> Answer:
        """AssumeRole that means it: a missing or wrong external id is AccessDenied, like an unknown role."""
        role_arn = call.params.get("RoleArn", "")
        session_name = call.params.get("RoleSessionName", "")
        if not role_arn or not session_name:
            raise AwsError("ValidationError", "RoleArn and RoleSessionName are required")
        seconds = int(call.params.get("DurationSeconds", 3600))
        if not 900 <= seconds <= 43_200:
            raise AwsError(
                "ValidationError",
                f"DurationSeconds {seconds} must be between 900 and 43200 seconds (15 minutes to 12 hours)",
            )
        account = next((a for a in self.by_id.values() if a.role_arn == role_arn), None)
        external_id = call.params.get("ExternalId")
        if (
            account is None
            or account.revoked
            or external_id is None
            or not hmac.compare_digest(external_id.encode(), account.external_id.encode())
            or call.caller.account_id not in (self.platform_account_id, account.account_id)
        ):
            raise AwsError(
                "AccessDenied",
                f"User: {call.caller.arn} is not authorized to perform: sts:AssumeRole on resource: {role_arn}",
                403,
            )
        expires = time.time() + seconds
        key_id = "ASIA" + base64.b32encode(secrets.token_bytes(10)).decode()
        token = self._seal(
            {
                "key": key_id,
                "account": account.account_id,
                "role": role_arn,
                "session": session_name,
                "expires": expires,
                "generation": account.generation,
            }
        )
        call.result.update(account_id=account.account_id, session_name=session_name)
        from_epoch = timestamp(_utc(expires))
        role_name = role_arn.rpartition("/")[2]
        return query_answer(
            call,
            STS_NAMESPACE,
            f"<AssumedRoleUser><AssumedRoleId>AROA{key_id[4:]}:{escape(session_name)}</AssumedRoleId>"
            f"<Arn>arn:aws:sts::{account.account_id}:assumed-role/{escape(role_name)}/{escape(session_name)}</Arn>"
            f"</AssumedRoleUser><Credentials><AccessKeyId>{key_id}</AccessKeyId>"
            f"<SecretAccessKey>{self._digest('session', key_id)[:40]}</SecretAccessKey>"
            f"<SessionToken>{token}</SessionToken><Expiration>{from_epoch}</Expiration></Credentials>",
        )

    def get_caller_identity(self, call: Call) -> Answer:
        caller = call.caller
        return query_answer(
            call,
            STS_NAMESPACE,
            f"<Arn>{escape(caller.arn)}</Arn><UserId>{caller.access_key_id}</UserId><Account>{caller.account_id}</Account>",
        )

    def _static_key_id(self, account_id: str) -> str:
        return "AKIA" + base64.b32encode(bytes.fromhex(self._digest("key", account_id)[:20])).decode()

    def _digest(self, purpose: str, subject: str) -> str:
        return hmac.new(self._key, f"{purpose}/{subject}".encode(), hashlib.sha256).hexdigest()

    def _seal(self, session: dict[str, Any]) -> str:
        body = base64.urlsafe_b64encode(msgspec.json.encode(session)).decode()
        return f"{body}.{self._digest('token', body)}"

    def _open(self, token: str) -> dict[str, Any] | None:
        body, _, mac = token.partition(".")
        if not hmac.compare_digest(mac, self._digest("token", body)):
            return None
        session: dict[str, Any] = msgspec.json.decode(base64.urlsafe_b64decode(body))
        return session


_INVALID = {
    True: ("AuthFailure", "AWS was not able to validate the provided access credentials"),
    False: ("InvalidClientTokenId", "The security token included in the request is invalid."),
}


def _utc(epoch_seconds: float) -> Any:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(epoch_seconds, UTC)
