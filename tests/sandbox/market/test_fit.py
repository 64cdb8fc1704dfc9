"""The fit against the recorded prices, where they are present."""

from pathlib import Path

import pytest

from control.sandbox.market import load_catalogue, load_parameters
from control.sandbox.market.fit import catalogue_text, comparison, hazard_shares, main, recorded

# one region and two seeds keep it short; the whole table is in docs/market.md
REGION = "eu-west-1"

# how far the mean of the generated seeds may be off: absolute where a share or a correlation, else relative
ABSOLUTE = {
    "price changed after ~7 h, median pool": 0.1,
    "price changed after ~4 h, mean": 0.1,
    "autocorrelation of consecutive changes": 0.12,
    "cross-correlation of 1 d changes, type": 0.2,
}
RELATIVE = {
    "ratio, quantile 0.05": 0.35,
    "ratio, quantile 0.5": 0.35,
    "ratio, quantile 0.95": 0.35,
    "volatility, sd of d log over ~7 h": 0.45,
    "volatility, rms of d log over 1 d": 0.45,
    "volatility, rms of d log over 7 d": 0.6,
}


def test_generated_prices_have_the_recorded_ones_moments(shared_data: Path) -> None:
    panel = recorded(shared_data / "spot_price_catalog", REGION)
    assert panel.usd.shape[1] > 250
    rows = {row["statistic"]: row for row in comparison([panel], load_parameters(), seeds=(1, 2))}
    off = {name: rows[name]["generated"] - rows[name]["recorded"] for name in ABSOLUTE}
    assert {name: abs(value) < ABSOLUTE[name] for name, value in off.items()} == dict.fromkeys(ABSOLUTE, True), off
    ratio = {name: rows[name]["generated"] / rows[name]["recorded"] - 1 for name in RELATIVE}
    assert {name: abs(value) < RELATIVE[name] for name, value in ratio.items()} == dict.fromkeys(RELATIVE, True), ratio

    def shared(what: str) -> float:
        return float(rows[f"cross-correlation of 1 d changes, {what}"]["generated"])

    # what pools share orders their correlation, as recorded
    assert shared("nothing shared") < shared("family") <= shared("family and zone") < shared("type")


def test_shipped_catalogue_is_what_the_recording_says(shared_data: Path) -> None:
    text = catalogue_text(shared_data / "spot_price_catalog", list(load_catalogue().types))
    import control.sandbox.market as package

    assert text == Path(str(package.__file__)).with_name("catalogue.json").read_text()


def test_hazard_classes_are_those_of_the_spot_advisor(shared_data: Path) -> None:
    shares = hazard_shares(shared_data / "spot_advisor" / "spot_advisor.parquet")
    assert shares is not None
    assert load_parameters().hazard_per_month_shares == pytest.approx(shares)


def test_folder_without_a_recording_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path} has no on_demand_price.parquet" in capsys.readouterr().err
