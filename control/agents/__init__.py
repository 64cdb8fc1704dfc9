"""Agents: the task queue, metrics and events in, and the stream."""
