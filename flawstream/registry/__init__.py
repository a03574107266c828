"""The registry of model versions."""
