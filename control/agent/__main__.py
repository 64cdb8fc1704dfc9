"""`python -m control.agent --help`."""

import sys

from control.agent.main import main

main(sys.argv[1:])
