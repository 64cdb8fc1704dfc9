"""Migrations up and down on a database that holds a row in every table."""

from __future__ import annotations

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Double, MetaData, Numeric, Table, create_engine, inspect, text
from sqlalchemy.engine import make_url

from control.embedded import EmbeddedPostgres, free_port
from tests.warehouse.postgres.filling import fill
from warehouse.postgres.migrate import alembic_config, assert_durable, downgrade, upgrade
from warehouse.postgres.models import Base
from warehouse.postgres.session import SyncDatabase, driver_url


def revisions(url: str) -> list[str]:
    script = ScriptDirectory.from_config(alembic_config(url))
    return [revision.revision for revision in script.walk_revisions()][::-1]


def tables(url: str) -> set[str]:
    engine = create_engine(driver_url(url))
    try:
        return {name for name in inspect(engine).get_table_names() if name != "alembic_version"}
    finally:
        engine.dispose()


def test_there_is_one_head(database_url):
    script = ScriptDirectory.from_config(alembic_config(database_url))
    assert len(script.get_heads()) == 1


def test_the_models_and_the_migrated_schema_agree(database_url):
    engine = create_engine(driver_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_object": lambda _o, name, kind, *_: (
                    not (kind == "table" and name.startswith("metric_samples_"))
                ),
                "compare_type": True,
            },
        )
        differences = compare_metadata(context, Base.metadata)
    engine.dispose()
    assert differences == []


def test_constraints_and_indexes_are_the_models_to_the_letter(database_url, postgres_server):
    """What autogenerate does not compare: checks, partial indexes and every name."""
    modelled = f"modelled_{abs(hash(database_url)):x}"
    postgres_server.ensure_database(modelled)
    engine = create_engine(driver_url(postgres_server.url(modelled)))
    Base.metadata.create_all(engine)
    engine.dispose()
    assert _details(database_url) == _details(postgres_server.url(modelled))


def _details(url: str) -> set[tuple[str, str]]:
    engine = create_engine(driver_url(url))
    names = [table.name for table in Base.metadata.sorted_tables if table.name != "metric_samples"]
    with engine.connect() as connection:
        rows = connection.execute(
            text("""
                SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
                WHERE conrelid = ANY(CAST(:names AS regclass[])) AND contype <> 'n'
                UNION ALL
                SELECT indexname, indexdef FROM pg_indexes WHERE tablename = ANY(CAST(:names AS name[]))
            """),
            {"names": names},
        )
        found = {(row[0], row[1]) for row in rows}
    engine.dispose()
    return found


def test_money_is_never_a_float():
    floats = [
        f"{table.name}.{column.name}"
        for table in Base.metadata.sorted_tables
        for column in table.columns
        if "usd" in column.name and (isinstance(column.type, Double) or not isinstance(column.type, Numeric))
    ]
    assert floats == []


def test_down_to_nothing_and_up_again_on_a_filled_database(database_url):
    database = SyncDatabase(database_url)
    with database.system() as connection:
        fill(connection)
    database.close()
    filled = tables(database_url)
    downgrade(database_url, "base")
    assert tables(database_url) == set()
    upgrade(database_url)
    assert {name for name in tables(database_url) if not name.startswith("metric_samples_")} == {
        name for name in filled if not name.startswith("metric_samples_")
    }
    database = SyncDatabase(database_url)
    with database.system() as connection:
        fill(connection)
    database.close()


def test_each_step_up_keeps_the_rows_that_were_there(database_url):
    downgrade(database_url, "base")
    first, *later = revisions(database_url)
    upgrade(database_url, first)
    engine = create_engine(driver_url(database_url))
    reflected = MetaData()
    reflected.reflect(engine, only=lambda name, _: not name.startswith(("metric_samples_", "alembic")))
    database = SyncDatabase(database_url)
    with database.system() as connection:
        rows = fill(connection, [_as_modelled(table) for table in reflected.sorted_tables])
    for revision in later:
        upgrade(database_url, revision)
    with database.system() as connection:
        for name in rows:
            assert connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() == 1, name
    for revision in [*revisions(database_url)[:-1]][::-1]:
        downgrade(database_url, revision)
    with database.system() as connection:
        for name in rows:
            assert connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() == 1, name
    upgrade(database_url)
    database.close()
    engine.dispose()


def test_of_two_interruptions_under_way_of_an_instance_the_one_that_ends_sooner_goes_on(database_url):
    database = SyncDatabase(database_url)
    with database.system() as connection:
        fill(connection)
    downgrade(database_url, "20261127_tenant_walls")
    copied = """
        INSERT INTO interruptions
        SELECT (jsonb_populate_record(i, jsonb_build_object('id', gen_random_uuid(), 'interruption_key', 'another',
                                                           'deadline_at', i.deadline_at + interval '1 hour'))).*
        FROM interruptions i RETURNING id"""
    with database.system() as connection:
        second = connection.execute(text(copied)).scalar_one()
    upgrade(database_url)
    with database.system() as connection:
        found = "SELECT id, state, outcome, version FROM interruptions ORDER BY deadline_at"
        first, other = connection.execute(text(found)).all()
        told = "SELECT version, state FROM interruption_history WHERE interruption_id = :id"
        history = connection.execute(text(told), {"id": second}).all()
    database.close()
    assert first.state == "open"
    assert (other.id, other.state, other.outcome) == (second, "closed", "cancelled")
    assert [tuple(row) for row in history] == [(other.version, "closed")]


def test_days_whose_savings_said_zero_of_what_nobody_measures_are_computed_again(database_url):
    downgrade(database_url, "20261128_failing_since")
    covered = """
        INSERT INTO partition_coverage (table_name, partition_key, series, covered_from, covered_until, expected_points,
                                        present_points, detail, run_id)
        SELECT name, key, series, now(), now(), 288, 288, '{}', ''
        FROM (VALUES ('metric_5m', '2026-11-19', 'a'), ('metric_5m', '2026-11-19', 'b'),
                     ('metric_5m', '2026-11-20', 'a'),
                     ('spot_prices', '2026-11-18|us-east-1', 'us-east-1')) AS rows (name, key, series)"""
    database = SyncDatabase(database_url)
    with database.system() as connection:
        connection.execute(text(covered))
    upgrade(database_url)
    with database.system() as connection:
        marks = connection.execute(text("SELECT table_name, partition_key FROM dirty_partitions ORDER BY 2")).all()
    database.close()
    assert marks == [("node_cost_hourly", "2026-11-19"), ("node_cost_hourly", "2026-11-20")]


def _as_modelled(table: Table) -> Table:
    """The reflected table with the model's checks, which reflection does not read back in a usable form."""
    model = Base.metadata.tables[table.name]
    for column in model.columns:
        if column.name in table.columns:
            table.columns[column.name].type = column.type
    table.constraints |= {check for check in model.constraints if type(check).__name__ == "CheckConstraint"}
    return table


def test_running_it_twice_changes_nothing(database_url):
    upgrade(database_url)
    upgrade(database_url)
    assert tables(database_url) >= {"customers", "user_sessions"}


def test_a_server_that_loses_commits_is_refused(database_url):
    assert_durable(database_url)
    separator = "&" if "?" in database_url else "?"
    with pytest.raises(RuntimeError, match="synchronous_commit"):
        assert_durable(f"{database_url}{separator}options=-csynchronous_commit%3Doff")


def test_an_owner_who_is_no_superuser_can_migrate(server_folder):
    """As on managed Postgres: a login that may create roles and owns its database."""
    server = EmbeddedPostgres(server_folder / "managed", port=free_port()).start()
    try:
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute("CREATE ROLE landlord LOGIN CREATEROLE PASSWORD 'a-password-of-a-test'")
            connection.execute("CREATE DATABASE managed OWNER landlord")
        url = make_url(server.url("managed")).set(username="landlord", password="a-password-of-a-test")
        address = url.render_as_string(hide_password=False)
        upgrade(address)
        database = SyncDatabase(address)
        with database.system() as connection:
            fill(connection)
        database.close()
    finally:
        server.stop()
