"""The test servers themselves: a test's database is migrated, empty and its own."""

import psycopg
import pytest


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_gets_an_empty_migrated_database(database_url, turn):
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM customers").fetchone() == (0,)
        connection.execute("CREATE TABLE left_behind (value int)")


def test_shared_database_is_migrated(postgres_url):
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT to_regclass('customers')").fetchone() != (None,)
