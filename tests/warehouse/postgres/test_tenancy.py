"""Row-level security on the real schema: the second wall holds with the first one removed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, create_engine, select, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from tests.warehouse.postgres.filling import customer_of, fill
from warehouse.postgres.models import Base, Cluster, Customer
from warehouse.postgres.session import ML_ROLE, TENANT_ROLE, Database, SyncDatabase, driver_url
from warehouse.postgres.tenancy import SHARED_WHEN_NULL, tenant_tables

TENANT_TABLES = [table.name for table in tenant_tables()]


@pytest.fixture(scope="module")
def two_customers(postgres_url: str) -> Iterator[tuple[SyncDatabase, dict[str, Any], dict[str, Any]]]:
    """A row of each of two customers in every table."""
    database = SyncDatabase(postgres_url)
    with database.system() as connection:
        first, second = fill(connection), fill(connection)
    yield database, first, second
    database.close()


def owner(database: SyncDatabase) -> Connection:
    return database.engine.connect()


def test_every_table_with_tenant_data_is_secured_forced_and_has_both_policies(two_customers):
    database, *_ = two_customers
    with owner(database) as connection:
        rows = connection.execute(
            text("""
                SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity,
                       ARRAY(SELECT polname::text FROM pg_policy p WHERE p.polrelid = c.oid ORDER BY 1) AS policies
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
                  AND (c.relname = 'customers' OR EXISTS (
                      SELECT FROM pg_attribute a
                      WHERE a.attrelid = c.oid AND a.attname = 'customer_id' AND NOT a.attisdropped))
            """)
        ).all()
    found = {row.relname: (row.relrowsecurity, row.relforcerowsecurity, row.policies) for row in rows}
    assert set(found) == set(TENANT_TABLES)
    expected = {name: ["shared"] * (name in SHARED_WHEN_NULL) + ["system", "tenant"] for name in found}
    assert {name for name, state in found.items() if state != (True, True, expected[name])} == set()


def test_nobody_but_the_owner_may_touch_a_partition_or_read_one(two_customers):
    database, first, _ = two_customers
    with owner(database) as connection:
        partitions = (
            connection.execute(
                text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'metric_samples'::regclass")
            )
            .scalars()
            .all()
        )
    assert partitions
    for scope in (database.tenant(customer_of(first)), database.system()):
        with pytest.raises(ProgrammingError, match="permission denied"), scope as connection:
            connection.execute(text(f"SELECT * FROM {partitions[0]}"))


@pytest.mark.parametrize("name", TENANT_TABLES)
def test_a_tenant_sees_its_own_rows_without_any_filter(two_customers, name):
    database, first, second = two_customers
    table = Base.metadata.tables[name]
    column = table.c.id if name == "customers" else table.c.customer_id
    for rows in (first, second):
        with database.tenant(customer_of(rows)) as connection:
            seen = set(connection.execute(select(column)).scalars())
        assert seen - ({None} if name in SHARED_WHEN_NULL else set()) == {customer_of(rows)}


@pytest.mark.parametrize("name", TENANT_TABLES)
def test_a_tenant_writes_no_row_of_another(two_customers, name):
    database, first, second = two_customers
    column = "id" if name == "customers" else "customer_id"
    append_only = name in ("audit_log", "task_reports", "interruption_history")
    with database.tenant(customer_of(first)) as connection:
        for statement in (f"UPDATE {name} SET {column} = {column}", f"DELETE FROM {name}"):
            if append_only:
                with pytest.raises(ProgrammingError, match="permission denied"), connection.begin_nested():
                    connection.execute(text(statement))
                continue
            changed = connection.execute(text(f"{statement} WHERE {column} = :other"), {"other": customer_of(second)})
            assert changed.rowcount == 0
    if name != "customers" and not append_only:
        with pytest.raises(DBAPIError, match="row-level security"), database.tenant(customer_of(first)) as connection:
            connection.execute(
                text(f"UPDATE {name} SET customer_id = :other WHERE customer_id = :own"),
                {"other": customer_of(second), "own": customer_of(first)},
            )


@pytest.mark.parametrize("name", sorted(SHARED_WHEN_NULL))
def test_shared_rows_are_read_by_tenants_and_written_by_the_system_only(two_customers, name):
    database, first, _ = two_customers
    own = {"own": customer_of(first)}
    with owner(database) as connection, connection.begin():
        connection.execute(text("SELECT set_config('role', 'cloudoptim_system', true)"))
        shared = text(f"UPDATE {name} SET customer_id = NULL WHERE customer_id = :own")
        assert connection.execute(shared, own).rowcount == 1
        connection.execute(
            text("SELECT set_config('role', :role, true), set_config('app.customer_id', :own, true)"),
            {"role": TENANT_ROLE, "own": str(customer_of(first))},
        )
        assert connection.execute(text(f"SELECT count(*) FROM {name} WHERE customer_id IS NULL")).scalar_one() >= 1
        for statement in (f"UPDATE {name} SET customer_id = :own", f"DELETE FROM {name}"):
            assert connection.execute(text(f"{statement} WHERE customer_id IS NULL"), own).rowcount == 0
            assert connection.execute(text(statement), own).rowcount == 0
        connection.rollback()


@pytest.mark.parametrize("setting", [None, "", "no-uuid"])
def test_an_unset_scope_sees_nothing(two_customers, setting):
    database, *_ = two_customers
    with database.engine.begin() as connection:
        connection.execute(text("SELECT set_config('role', :role, true)"), {"role": TENANT_ROLE})
        if setting is not None:
            connection.execute(text("SELECT set_config('app.customer_id', :value, true)"), {"value": setting})
        if setting == "no-uuid":
            with pytest.raises(DBAPIError, match="uuid"):
                connection.execute(select(Cluster.id))
            return
        for name in TENANT_TABLES:
            rows = connection.execute(text(f"SELECT * FROM {name}")).all()
            assert all(getattr(row, "customer_id", 1) is None for row in rows), name


def test_a_scope_ends_with_its_transaction_on_the_same_connection(two_customers, postgres_url):
    _, first, _ = two_customers
    database = SyncDatabase(postgres_url, pool_size=1, max_overflow=0)
    with database.tenant(customer_of(first)) as connection:
        process = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with database.engine.begin() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() == process
        user, role, customer = connection.execute(
            text("SELECT session_user, current_user, current_setting('app.customer_id', true)")
        ).one()
        assert user == role
        assert not customer
        connection.execute(text("SELECT set_config('role', :role, true)"), {"role": TENANT_ROLE})
        assert connection.execute(select(Cluster.id)).all() == []
    database.close()


async def test_scopes_do_not_leak_over_a_pool_of_one(two_customers, postgres_url):
    _, first, second = two_customers
    database = Database(postgres_url, pool_size=1, max_overflow=0)
    for rows in (first, second, first):
        async with database.tenant(customer_of(rows)) as conn:
            assert set((await conn.execute(select(Customer.id))).scalars()) == {customer_of(rows)}
    async with database.tenant(uuid4()) as conn:
        assert (await conn.execute(select(Customer.id))).all() == []
    await database.close()


def test_even_the_owner_of_the_tables_is_held_back_unless_superuser(two_customers):
    """FORCE: ownership opens nothing. The embedded login is a superuser, so a plain owner is made for the test."""
    database, first, _ = two_customers
    with owner(database) as connection, connection.begin():
        name = f"owner_{uuid4().hex[:8]}"
        connection.execute(text(f"CREATE ROLE {name} NOLOGIN"))
        connection.execute(text(f"CREATE SCHEMA {name} AUTHORIZATION {name}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA public TO {name}"))
        connection.execute(text(f"ALTER TABLE clusters OWNER TO {name}"))
        connection.execute(text(f"SET LOCAL ROLE {name}"))
        assert connection.execute(text("SELECT count(*) FROM clusters")).scalar_one() == 0
        connection.rollback()
    with database.tenant(customer_of(first)) as connection:
        assert len(connection.execute(select(Cluster.id)).all()) == 1


def test_the_roles_can_neither_bypass_nor_log_in(two_customers):
    database, *_ = two_customers
    with owner(database) as connection:
        rows = connection.execute(
            text("""SELECT rolname, rolsuper, rolbypassrls, rolcanlogin, rolcreaterole FROM pg_roles
                    WHERE rolname IN ('cloudoptim_tenant', 'cloudoptim_system', 'ml_readonly')""")
        ).all()
    assert len(rows) == 3
    assert all(row[1:] == (False, False, False, False) for row in rows)


def test_the_ml_servers_role_reads_its_views_and_no_table(two_customers):
    database, first, second = two_customers
    with database.engine.begin() as connection:
        views = (
            connection.execute(text("SELECT table_name FROM information_schema.views WHERE table_schema = 'ml'"))
            .scalars()
            .all()
        )
        connection.execute(text("SELECT set_config('role', :role, true)"), {"role": ML_ROLE})
        for view in views:
            connection.execute(text(f"SELECT * FROM ml.{view} LIMIT 1"))
        seen = set(connection.execute(text("SELECT customer_id FROM ml.nodes")).scalars())
        assert {customer_of(first), customer_of(second)} <= seen
        for name in ("customers", "api_keys", "users", "clusters", "audit_log"):
            with pytest.raises(ProgrammingError, match="permission denied"), connection.begin_nested():
                connection.execute(text(f"SELECT * FROM {name}"))
    assert len(views) >= 6


def test_views_of_tenants_hide_what_tables_hide(two_customers):
    """A view that is not security_invoker would run with its owner's rights and show every tenant's rows."""
    database, *_ = two_customers
    with owner(database) as connection:
        public_views = (
            connection.execute(
                text(
                    "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                    "WHERE n.nspname = 'public' AND c.relkind IN ('v', 'm') AND NOT coalesce("
                    "(SELECT option_value::bool FROM pg_options_to_table(c.reloptions) "
                    "WHERE option_name = 'security_invoker'), false)"
                )
            )
            .scalars()
            .all()
        )
    assert public_views == []
    for scope in (database.tenant(uuid4()),):
        with pytest.raises(ProgrammingError, match="permission denied"), scope as connection:
            connection.execute(text("SELECT * FROM ml.nodes"))


def test_the_audit_log_and_other_histories_only_grow(two_customers):
    database, first, _ = two_customers
    for name in ("audit_log", "task_reports", "interruption_history"):
        for statement in (f"UPDATE {name} SET customer_id = customer_id", f"DELETE FROM {name}", f"TRUNCATE {name}"):
            for scope in (database.tenant(customer_of(first)), database.system()):
                with pytest.raises(DBAPIError, match=r"permission denied|append-only"), scope as connection:
                    connection.execute(text(statement))
    with pytest.raises(DBAPIError, match="append-only"), owner(database) as connection:
        connection.execute(text("UPDATE audit_log SET actor = 'somebody else'"))


def test_an_external_id_never_changes(two_customers):
    database, first, _ = two_customers
    with pytest.raises(DBAPIError, match="external_id never changes"), database.system() as connection:
        connection.execute(
            text("UPDATE customers SET external_id = gen_random_uuid() WHERE id = :id"), {"id": customer_of(first)}
        )


def test_a_row_cannot_refer_to_another_tenants_cluster(two_customers):
    database, first, second = two_customers
    with pytest.raises(DBAPIError, match="foreign key"), database.system() as connection:
        connection.execute(
            text("UPDATE nodes SET customer_id = :second WHERE customer_id = :first"),
            {"first": customer_of(first), "second": customer_of(second)},
        )


def test_a_key_and_a_sign_in_belong_to_one_customer(two_customers):
    database, first, second = two_customers
    for statement in (
        "UPDATE api_keys SET cluster_id = (SELECT id FROM clusters WHERE customer_id = :second) "
        "WHERE customer_id = :first",
        "UPDATE user_sessions SET user_id = (SELECT id FROM users WHERE customer_id = :second) "
        "WHERE customer_id = :first",
    ):
        with pytest.raises(DBAPIError, match="foreign key"), database.system() as connection:
            connection.execute(text(statement), {"first": customer_of(first), "second": customer_of(second)})


def test_a_tenant_may_not_run_the_partition_functions(two_customers):
    database, first, _ = two_customers
    for call in ("ensure_metric_partitions(current_date, current_date)", "drop_metric_partitions(current_date - 9)"):
        with (
            pytest.raises(ProgrammingError, match="permission denied"),
            database.tenant(customer_of(first)) as connection,
        ):
            connection.execute(text(f"SELECT {call}"))


def test_the_driver_is_named_whatever_the_url_says():
    assert driver_url("postgresql://u:p@h/db") == "postgresql+psycopg://u:p@h/db"
    engine = create_engine(driver_url("postgres://u@h/db".replace("postgres:", "postgresql:")))
    assert engine.dialect.driver == "psycopg"
    assert isinstance(uuid4(), UUID)
