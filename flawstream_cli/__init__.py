"""The `flawstream` command: the only room above all others."""
