"""Who may do what: keys, tokens, roles, tenant scope, limits, secrets, outbound URLs and the audit log."""
