"""WebSockets: tasks pushed to agents, live figures pushed to dashboards."""
