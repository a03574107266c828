"""Engines: one file each, one protocol, one contract test."""
