"""Decoding and resizing of images; encoding and decoding of anomaly maps."""
