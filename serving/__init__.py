"""Ray Serve: detectors with dynamic batching, stream workers and the HTTP API."""
