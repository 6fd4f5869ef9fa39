"""Tests of features without any server: see `features.testing`."""

from features.testing import DAY, Moment, Scenario, events, milliseconds

__all__ = ["DAY", "Moment", "Scenario", "events", "milliseconds"]
