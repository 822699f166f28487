"""Examples: scripts that run as they stand, each run by the tests."""
