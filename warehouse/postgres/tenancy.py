"""Row-level security: the second wall below the tenant scope of every repository call.

Two group roles hold all rights; nobody works as the tables' owner. ``cloudoptim_tenant`` sees rows whose
``customer_id`` is the transaction's ``app.customer_id``; ``cloudoptim_system`` sees all rows. Security is forced, so
it holds for the owner too. A setting that was never made, or made empty by an earlier transaction on the same
connection, matches nothing.
"""

from __future__ import annotations

from sqlalchemy import Table

from warehouse.postgres.models import Base
from warehouse.postgres.session import ML_ROLE, SYSTEM_ROLE, TENANT_ROLE

CURRENT_CUSTOMER = "nullif(current_setting('app.customer_id', true), '')::uuid"

# Rows without a customer in these tables describe pools and prices: everyone may read them, only the system writes.
SHARED_WHEN_NULL = frozenset({"predictions", "data_gaps", "partition_coverage"})


def tenant_tables() -> list[Table]:
    """Tables that carry tenant data: those with a customer_id, and the customers themselves."""
    return [table for table in Base.metadata.sorted_tables if "customer_id" in table.c or table.name == "customers"]


def role_statements() -> list[str]:
    """Create the roles where they are missing (roles belong to the whole server) and let the login use them."""
    create = """
        DO $$ BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
                CREATE ROLE {role} NOLOGIN NOBYPASSRLS;
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
        END $$"""
    # Granting a role one already has is an update of the same catalogue row: two migrations at once would collide.
    # From Postgres 16 on, who creates a role without being a superuser may administer it, but not become it.
    grant = """
        DO $$ BEGIN
            IF NOT pg_has_role(current_user, '{role}', 'MEMBER') OR NOT EXISTS (
                SELECT FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
                WHERE r.rolname = '{role}' AND m.member = current_user::regrole
                  AND coalesce(CAST(to_jsonb(m) ->> 'set_option' AS boolean), true)
            ) THEN
                PERFORM pg_advisory_xact_lock(hashtext('cloudoptim.roles'));
                EXECUTE 'GRANT {role} TO ' || quote_ident(current_user);
            END IF;
        END $$"""
    return [create.format(role=role) for role in (TENANT_ROLE, SYSTEM_ROLE, ML_ROLE)] + [
        grant.format(role=role) for role in (TENANT_ROLE, SYSTEM_ROLE)
    ]


def tenant_table_statements(table: str, *, append_only: bool = False) -> list[str]:
    """Rights, forced row-level security and the policies of one table that carries tenant data.

    Called by migrations with the tables they create.
    """
    rights = "SELECT, INSERT" if append_only else "SELECT, INSERT, UPDATE, DELETE"
    return [
        f"GRANT {rights} ON {table} TO {SYSTEM_ROLE}, {TENANT_ROLE}",
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
        *tenant_policy_statements(table),
        f"CREATE POLICY system ON {table} TO {SYSTEM_ROLE} USING (true) WITH CHECK (true)",
    ]


def tenant_policy_statements(table: str) -> list[str]:
    """What a tenant may do with a table's rows. Reading shared rows is a policy of its own: within one policy for all
    commands, a row that may be seen may also be deleted, or taken over by an update."""
    column = "id" if table == "customers" else "customer_id"
    own = f"{column} = {CURRENT_CUSTOMER}"
    statements = [f"CREATE POLICY tenant ON {table} TO {TENANT_ROLE} USING ({own}) WITH CHECK ({own})"]
    if table in SHARED_WHEN_NULL:
        statements.append(f"CREATE POLICY shared ON {table} FOR SELECT TO {TENANT_ROLE} USING ({column} IS NULL)")
    return statements


def platform_table_statements(table: str, *, readable_by_tenants: bool = False) -> list[str]:
    """Rights on one table that belongs to the platform."""
    statements = [f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {SYSTEM_ROLE}"]
    if readable_by_tenants:
        statements.append(f"GRANT SELECT ON {table} TO {TENANT_ROLE}")
    return statements
