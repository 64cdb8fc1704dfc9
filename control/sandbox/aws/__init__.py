"""An AWS account that lives on this machine; see `server.py` for how to use it as a fixture."""

from control.sandbox.aws.accounts import Account, Credentials
from control.sandbox.aws.faults import Fault
from control.sandbox.aws.instances import Instance
from control.sandbox.aws.server import SandboxAWS, SandboxAWSThread, SandboxConfig

__all__ = ["Account", "Credentials", "Fault", "Instance", "SandboxAWS", "SandboxAWSThread", "SandboxConfig"]
