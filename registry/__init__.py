"""Feast: the plan compiled to its registry, and its stores in front of ours."""
