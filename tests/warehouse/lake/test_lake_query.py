"""Reading: tenants, limits, hostile text, features we must not misread, many threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path

import duckdb
import polars as pl
import pytest
from deltalake import DeltaTable

from tests.warehouse.lake.lake_rows import CUSTOMER_A, CUSTOMER_B, node_costs, node_hours, prices
from warehouse.lake.errors import LakeError, LakeQueryError, TenantScopeError
from warehouse.lake.plans import refuse_features
from warehouse.lake.query import PLANNED_RELEASES, LakeReader, Limits, restricted
from warehouse.lake.store import Lake, PartitionWrite
from warehouse.lake.tables import TABLES
from warehouse.lake.texts import reading_statement

DAY_1 = {"day": "2024-01-01", "region": "us-east-1"}


def publish(lake: Lake, *writes: PartitionWrite):
    return lake.publish(list(writes), run_id="test")


@pytest.fixture
def two_customers(lake: Lake) -> Lake:
    """A has 24 hours at 0.10, B has 10 hours at 0.20."""
    hours = pl.concat([node_hours(CUSTOMER_A, 1, 24), node_hours(CUSTOMER_B, 1, 10)])
    costs = pl.concat([node_costs(CUSTOMER_A, 1, 24, price="0.1"), node_costs(CUSTOMER_B, 1, 10, price="0.2")])
    publish(lake, PartitionWrite("node_hours", DAY_1, hours), PartitionWrite("node_cost_hourly", DAY_1, costs))
    return lake


def test_an_empty_table_is_a_view_with_its_columns_and_types(reader: LakeReader) -> None:
    for name, spec in TABLES.items():
        empty = reader.query(f"SELECT * FROM {name}", all_customers=True)
        assert empty.num_rows == 0
        assert empty.schema.names == list(spec.names)
        assert [field.type for field in empty.schema] == [column.type for column in spec.columns], name


def test_a_filled_table_has_the_same_columns_and_types(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    filled = reader.query("SELECT * FROM spot_prices")
    assert [(f.name, f.type) for f in filled.schema] == [(c.name, c.type) for c in TABLES["spot_prices"].columns]


def test_a_customer_sees_own_rows_only_even_when_the_text_forgets_to_filter(
    two_customers: Lake, reader: LakeReader
) -> None:
    forgetful = "SELECT count(*) AS n, min(customer_id) AS low, max(customer_id) AS high FROM node_hours"
    for customer_id, rows in ((CUSTOMER_A, 24), (CUSTOMER_B, 10)):
        seen = reader.query(forgetful, {"customer_id": customer_id}).to_pylist()
        assert seen == [{"n": rows, "low": customer_id, "high": customer_id}]
    assert reader.query(forgetful, {"customer_id": "' OR 1=1 --"}).to_pylist()[0]["n"] == 0
    assert reader.query(forgetful, all_customers=True).to_pylist()[0]["n"] == 34


def test_the_customer_may_also_be_named_in_the_text(two_customers: Lake, reader: LakeReader) -> None:
    text = "SELECT count(*) AS n FROM node_hours WHERE customer_id = $customer_id AND ts >= $since"
    since = datetime(2024, 1, 1, 12, tzinfo=UTC)
    assert reader.query(text, {"customer_id": CUSTOMER_A, "since": since}).to_pylist() == [{"n": 12}]


def test_tenant_tables_do_not_exist_without_a_customer(two_customers: Lake, reader: LakeReader) -> None:
    with pytest.raises(TenantScopeError, match="node_hours holds customers' data: pass customer_id"):
        reader.query("SELECT count(*) FROM node_hours")
    with pytest.raises(TenantScopeError, match="customer_id is None"):
        reader.query("SELECT count(*) FROM node_hours", {"customer_id": None})
    with pytest.raises(TenantScopeError, match="contradict"):
        reader.query("SELECT count(*) FROM node_hours", {"customer_id": CUSTOMER_A}, all_customers=True)


def test_rows_of_nobody_are_shared_only_where_the_table_says_so(lake: Lake, reader: LakeReader) -> None:
    at = datetime(2024, 1, 1, tzinfo=UTC)
    pool = {
        "ts": at,
        "prediction_id": "p",
        "kind": "interruption_rate",
        "subject": "use1-az1/m5.large",
        "window_start": at,
        "window_end": at,
        "value": 0.1,
        "model_version": "1",
        "made_by": "advisor",
    }
    event = {"ts": at, "event_id": "e", "event_type": "spot_interruption", "received_from": "sqs", "source": "observed"}
    publish(
        lake,
        PartitionWrite("predictions", {"day": "2024-01-01"}, pl.DataFrame([pool])),
        PartitionWrite("events", {"day": "2024-01-01"}, pl.DataFrame([event])),
    )
    counts = "SELECT (SELECT count(*) FROM predictions) AS predictions, (SELECT count(*) FROM events) AS events"
    assert reader.query(counts, {"customer_id": CUSTOMER_A}).to_pylist() == [{"predictions": 1, "events": 0}]
    assert reader.query(counts, all_customers=True).to_pylist() == [{"predictions": 1, "events": 1}]


def test_threads_with_different_customers_never_see_each_other(two_customers: Lake, reader: LakeReader) -> None:
    text = "SELECT DISTINCT customer_id FROM node_cost_hourly"
    page = reader.pin()

    def ask(index: int) -> bool:
        customer_id = (CUSTOMER_A, CUSTOMER_B)[index % 2]
        return page.query(text, {"customer_id": customer_id})["customer_id"].to_pylist() == [customer_id]

    with ThreadPoolExecutor(max_workers=4) as pool:
        assert all(pool.map(ask, range(80)))


@pytest.mark.parametrize(
    "text",
    [
        "SELECT count(*) FROM all_{release}.node_hours",
        "SELECT count(*) FROM memory.all_{release}.node_hours",
        'SELECT count(*) FROM versions."node_hours_v{version}"',
        "SELECT (SELECT count(*) FROM all_{release}.node_hours)",
        "WITH h AS (SELECT * FROM all_{release}.node_hours) SELECT count(*) FROM h",
        "SUMMARIZE all_{release}.node_hours",
        "SHOW TABLES FROM all_{release}",
        "SELECT count(*) FROM query_table('all_{release}.node_hours')",
        "SELECT count(*) FROM read_parquet('{root}/node_hours/**/*.parquet')",
        "SELECT count(*) FROM '{root}/node_hours/**/*.parquet'",
        "WITH \"{root}/node_hours/**/*.parquet\" AS (SELECT * FROM '{root}/node_hours/**/*.parquet') SELECT 1",
        "SELECT * FROM glob('{root}/**')",
        "SELECT * FROM parquet_metadata('{root}/node_hours/**/*.parquet')",
    ],
)
def test_no_text_leaves_the_scope_of_its_customer(two_customers: Lake, reader: LakeReader, text: str) -> None:
    page = reader.pin()
    page.query("SELECT 1", all_customers=True)
    release = page.release
    text = text.format(release=release.id, version=release.versions["node_hours"], root=two_customers.storage.root)
    for parameters in ({"customer_id": CUSTOMER_A}, {}):
        with pytest.raises(LakeQueryError, match=r"names a schema|not allowed|is no table"):
            page.query(text, parameters)
        with (
            pytest.raises(LakeQueryError, match=r"names a schema|not allowed|is no table"),
            page.stream(text, parameters) as rows,
        ):
            rows.read_all()


@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        ("SELECT $since", {}, r"names \$since, but no such parameter"),
        ("SELECT 1", {"since": 1}, r"parameter since is given, but the query does not name it"),
        ("SELECT nothing FROM spot_prices", {}, r"column \"nothing\" not found"),
        ("SELECT * FROM nowhere", {}, r"there is no table nowhere; the tables are spot_prices"),
        ("SELEC 1", {}, r"cannot be read: Parser Error"),
        ("", {}, r"exactly one statement; this text has 0"),
    ],
)
def test_a_wrong_query_says_what_is_wrong(
    still_reader: LakeReader, text: str, parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(LakeQueryError, match=message):
        still_reader.query(text, parameters)


def test_a_query_that_runs_too_long_is_ended(still_lake: Lake) -> None:
    reader = LakeReader(still_lake, Limits(statement_seconds=0.2))
    with pytest.raises(LakeQueryError, match=r"longer than 0.2 s; filter by day"):
        reader.query("SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b")
    assert reader.query("SELECT 1 AS one").to_pylist() == [{"one": 1}]
    reader.close()


def test_a_query_that_needs_too_much_memory_says_so(still_lake: Lake) -> None:
    reader = LakeReader(still_lake, Limits(memory="20MB", spill="1MB"))
    with pytest.raises(LakeQueryError, match=r"needs more than 20MB of memory"):
        reader.query("SELECT length(string_agg(repeat('x', 1000) || range, '')) FROM range(200000)")
    reader.close()


WRITING = [
    "INSERT INTO spot_prices VALUES (1)",
    "DROP VIEW spot_prices",
    "CREATE TABLE x AS SELECT 1",
    "SET threads = 1",
    "PRAGMA version",
    "CALL duckdb_settings()",
    "ATTACH '/tmp/x.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "COPY (SELECT 1) TO '{target}'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{target}'",
    "EXPORT DATABASE '{folder}'",
    "SELECT 1; SELECT 2",
    "WITH a AS (COPY (SELECT 1) TO '{target}' (FORMAT parquet, USE_TMP_FILE false)) SELECT * FROM a",
    "SELECT * FROM (WITH a AS (COPY (SELECT 1) TO '{target}') SELECT * FROM a)",
    "SELECT * FROM query('WITH a AS (COPY (SELECT 1) TO ''{target}'') SELECT * FROM a')",
    "WITH a AS (INSERT INTO spot_prices VALUES (1) RETURNING *) SELECT * FROM a",
    "WITH a AS (DELETE FROM spot_prices RETURNING *) SELECT * FROM a",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{folder}')",
    "SELECT * FROM enable_profiling(format = 'json', save_location = '{target}')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('COPY (SELECT 1) TO ''{target}'''))",
    "SELECT * FROM JSON_EXECUTE_SERIALIZED_SQL('{{}}')",
    "SELECT * FROM system.main.json_execute_serialized_sql('{{}}')",
    "SELECT (SELECT count(*) FROM json_execute_serialized_sql('{{}}'))",
    "DESCRIBE SELECT * FROM json_execute_serialized_sql('{{}}')",
    "SELECT json_execute_serialized_sql('{{}}')",
    "SELECT * FROM query_table('spot_prices')",
    "SELECT * FROM histogram_values(spot_prices, price_usd_per_hour)",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM force_checkpoint()",
    "SELECT * FROM register_external_resource('a', 'b')",
    "SELECT * FROM destroy_external_resource('a')",
    "SELECT * FROM read_parquet('{target}')",
    "SELECT * FROM parquet_metadata('{target}')",
    "SELECT * FROM '{target}'",
    "WITH \"{target}\" AS (SELECT * FROM '{target}') SELECT 1",
    "SHOW '{target}'",
    "SUMMARIZE '{target}'",
    "SELECT * FROM duckdb_settings()",
    "SELECT getenv('HOME')",
    "SELECT read_text('{target}')",
    "SELECT write_log('x')",
    "SELECT nextval('x')",
]


@pytest.mark.parametrize("text", WRITING)
def test_text_that_does_more_than_read_is_refused_before_it_runs(tmp_path: Path, text: str) -> None:
    with pytest.raises(LakeQueryError):
        reading_statement(text.format(target=tmp_path / "target.parquet", folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "FROM spot_prices",
        "VALUES (1)",
        "DESCRIBE spot_prices",
        "SUMMARIZE spot_prices",
        "SHOW TABLES",
        "SHOW spot_prices",
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT * FROM n",
        "SELECT * FROM (SELECT 1) UNION ALL SELECT 2 ORDER BY 1 LIMIT 1",
        "PIVOT (SELECT 1 AS a, 2 AS b) ON a IN (1) USING sum(b)",
        "SELECT x.a, y.b FROM (SELECT 1 a) x ASOF JOIN (SELECT 1 a, 2 b) y ON x.a >= y.a",
        "SELECT * FROM range(3) AS n(i), generate_series(1, 2), unnest([1, 2])",
        "SELECT j.key FROM (SELECT '{\"a\": 1}' AS text) t, json_each(t.text) j",
    ],
)
def test_text_that_only_reads_runs(still_reader: LakeReader, text: str) -> None:
    assert still_reader.query(text).schema.names


OUTSIDE = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/hostname')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_csv('http://127.0.0.1:9/x')",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM sqlite_scan('/tmp/x.db', 't')",
    "SELECT * FROM text",
]


@pytest.mark.parametrize("text", OUTSIDE)
def test_a_persons_text_reads_nothing_but_the_pinned_files(still_reader: LakeReader, text: str) -> None:
    page = still_reader.pin()
    old_file = still_reader.plan(still_reader.lake.release(page.release.id - 1))["spot_prices"].uris[0]
    with restricted(page, Limits(memory="128MB")) as db:
        assert db.execute("SELECT count(*) FROM spot_prices").fetchall() == [(3,)]
        with pytest.raises(duckdb.Error):
            db.execute(text).fetchall()
        with pytest.raises(duckdb.PermissionException):
            db.execute(f"SELECT * FROM read_parquet('{old_file}')").fetchall()
        with pytest.raises(duckdb.InvalidInputException, match="locked"):
            db.execute("SET enable_external_access = true")
    with pytest.raises(LakeQueryError):
        page.query(text)


def test_a_persons_text_streams_and_may_be_held_to_one_customer(two_customers: Lake, reader: LakeReader) -> None:
    with reader.pin().ask("SELECT instance_id FROM node_hours") as rows:
        assert rows.read_all().num_rows == 34
    with reader.pin().ask("SELECT instance_id FROM node_hours", customer_id=CUSTOMER_B) as rows:
        assert rows.read_all().num_rows == 10
    for text, message in (
        ("COPY node_hours TO 'x.csv'", "only reading is allowed"),
        ("SELECT $since", "has no parameters"),
        ("SELECT nothing FROM node_hours", "nothing"),
        ("SELECT * FROM nowhere", "no table nowhere"),
        ("SELECT * FROM read_text('/etc/passwd')", "read_text is not allowed"),
    ):
        with pytest.raises(LakeQueryError, match=message), reader.pin().ask(text) as rows:
            rows.read_all()


def test_a_persons_text_sees_the_release_asked_for(lake: Lake, reader: LakeReader) -> None:
    first = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 5)))
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    with restricted(reader.pin(first.id), Limits()) as db:
        assert db.execute("SELECT count(*) FROM spot_prices").fetchall() == [(5,)]


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [("delta.enableDeletionVectors", "true", "deletionVectors"), ("delta.columnMapping.mode", "name", "columnMapping")],
)
def test_tables_that_plain_parquet_readers_would_misread_are_refused(
    tmp_path: Path, database_url: str, setting: str, value: str, named: str
) -> None:
    schema = TABLES["spot_prices"].schema()
    handle = DeltaTable.create(str(tmp_path / "plain"), schema=schema)
    refuse_features(handle, "plain")
    version = handle.version()
    log = tmp_path / "plain" / "_delta_log" / f"{version:020d}.json"
    text = log.read_text()
    assert '"configuration":{}' in text
    log.write_text(text.replace('"configuration":{}', f'"configuration":{{"{setting}":"{value}"}}'))
    with pytest.raises(LakeError, match=named):
        refuse_features(DeltaTable(str(tmp_path / "plain")), "spot_prices")


def test_old_releases_are_forgotten_and_planned_again_when_asked_for(lake: Lake, reader: LakeReader) -> None:
    releases = [
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, rows))) for rows in range(1, PLANNED_RELEASES + 4)
    ]
    for _ in range(2):
        for rows, release in enumerate(releases, start=1):
            assert reader.pin(release.id).query("SELECT count(*) AS n FROM spot_prices").to_pylist() == [{"n": rows}]
    assert len(reader._planned) <= PLANNED_RELEASES


def test_a_release_whose_file_was_away_is_read_when_the_file_is_back(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    (file,) = Path(lake.storage.uri("spot_prices")).glob("**/*.parquet")
    hidden = file.rename(file.with_suffix(".hidden"))
    page = reader.pin()
    for _ in range(2):
        with pytest.raises(LakeError, match=rf"release {page.release.id} cannot be opened: .*{file.name}"):
            page.query("SELECT count(*) AS n FROM spot_prices")
    hidden.rename(file)
    assert page.query("SELECT count(*) AS n FROM spot_prices").to_pylist() == [{"n": 3}]


def test_a_persons_text_overwrites_no_file(two_customers: Lake, reader: LakeReader) -> None:
    page = reader.pin()
    file = Path(reader.plan(page.release)["node_hours"].uris[0])
    before = file.read_bytes()
    with duckdb.connect() as db:
        inner = f"COPY (SELECT 1 AS a) TO '{file}' (FORMAT parquet, USE_TMP_FILE false)"
        tree = db.execute("SELECT json_serialize_sql($sql)", {"sql": f"WITH x AS ({inner}) FROM x"}).fetchall()[0][0]
    text = "SELECT * FROM json_execute_serialized_sql('{}')".format(tree.replace("'", "''"))
    with pytest.raises(LakeQueryError, match="json_execute_serialized_sql is not allowed"), page.ask(text) as rows:
        rows.read_all()
    assert file.read_bytes() == before


def test_only_tables_whose_version_moved_are_listed_again(
    lake: Lake, reader: LakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    real = Lake.delta_table

    def counted(self, table, version=None):
        listed.append(table)
        return real(self, table, version)

    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    reader.query("SELECT 1 AS one")
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    monkeypatch.setattr(Lake, "delta_table", counted)
    reader.query("SELECT 1 AS one")
    assert listed == ["spot_prices"]


def test_a_stream_goes_on_while_others_publish(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 50_000)))
    with reader.pin().stream("SELECT ts FROM spot_prices", batch_rows=2048) as rows:
        first = rows.read_next_batch().num_rows
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
        assert first + sum(batch.num_rows for batch in rows) == 50_000


def test_frames_beside_the_lake_can_be_joined(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 10)))
    wanted = pl.DataFrame({"zone_id": ["use1-az1"], "weight": [2]})
    text = "SELECT sum(weight) AS n FROM spot_prices JOIN wanted USING (zone_id)"
    assert reader.pin().query(text, inputs={"wanted": wanted}).to_pylist() == [{"n": 20}]
    with pytest.raises(LakeQueryError, match="would hide the lake table"):
        reader.pin().query("SELECT 1", inputs={"spot_prices": wanted})


def test_days_are_pruned_without_opening_files(lake: Lake, reader: LakeReader) -> None:
    publish(
        lake,
        *(
            PartitionWrite("spot_prices", {"day": f"2024-01-{day:02}", "region": "us-east-1"}, prices(day, 2))
            for day in range(1, 9)
        ),
    )
    page = reader.pin()
    text = "SELECT count(*) AS n FROM spot_prices WHERE day = $day"
    for file in Path(lake.storage.uri("spot_prices")).glob("day=2024-01-0[2-8]/**/*.parquet"):
        file.write_bytes(b"none of your business")
    assert page.query(text, {"day": date(2024, 1, 1)}).to_pylist() == [{"n": 2}]


def test_a_reader_is_shared_by_threads_while_releases_move(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                page = reader.pin()
                one = page.query("SELECT count(*) AS n FROM spot_prices").to_pylist()
                assert one == page.query("SELECT count(*) AS n FROM spot_prices").to_pylist()
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for rows in range(1, 30):
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, rows)))
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
