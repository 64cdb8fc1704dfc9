"""Subcommands of `cloudoptim` that are more than a call."""
