"""Clusters: registration, state, nodes, events, cost and the kill switch."""
