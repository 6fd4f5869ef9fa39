"""Feast: the plan compiled to its registry, and its stores in front of ours."""

# Before Feast, whose import would switch every metric of the process to files, for workers of its own server.
import prometheus_client as prometheus_client
