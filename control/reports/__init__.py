"""Savings reports as JSON, CSV, Parquet, HTML and FOCUS."""
