"""Images by reference: fetched from the stream server, from S3 or over HTTP, where the allow-list covers it."""

from workers.references.fetcher import ImageFetcher, NoReferences, ReferenceFetcher

__all__ = ["ImageFetcher", "NoReferences", "ReferenceFetcher"]
