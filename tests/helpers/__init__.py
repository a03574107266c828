"""What tests stand on: fakes, servers, files, and small models."""
