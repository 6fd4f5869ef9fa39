"""The exactly-once path as one deterministic simulation: the real code over a simulated log, Redis and clock."""
