"""Batch scoring: images in storage are judged as a stream worker judges them, and the results are Parquet files."""
