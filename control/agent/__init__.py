"""The reference agent: runs in a customer's cluster, sends metrics and events, takes tasks and reports results."""
