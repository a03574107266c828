"""Inference engines: one module each, one protocol, one contract test."""
