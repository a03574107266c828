"""What tests of the Helm chart stand on: rendering it, checking it, and running what it starts."""
