"""Long tests on a whole service: chaos, fuzz, overload. Each is a program with `--help`; the suite runs short forms."""
