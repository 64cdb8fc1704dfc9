"""A Spot market that lives: instance catalogue, price generator, hazards, and replay of recorded prices.

`Market` is what the AWS endpoint asks. Two implementations: `GeneratedMarket` (a pure function of seed and absolute
time) and `ReplayMarket` (a folder of Parquet).
"""

from control.sandbox.market.catalogue import REGIONS, Catalogue, InstanceType, Pool, load_catalogue
from control.sandbox.market.generator import GeneratedMarket, Parameters, load_parameters
from control.sandbox.market.interface import Market, PriceChanges
from control.sandbox.market.replay import ReplayMarket

__all__ = [
    "REGIONS",
    "Catalogue",
    "GeneratedMarket",
    "InstanceType",
    "Market",
    "Parameters",
    "Pool",
    "PriceChanges",
    "ReplayMarket",
    "load_catalogue",
    "load_parameters",
]
