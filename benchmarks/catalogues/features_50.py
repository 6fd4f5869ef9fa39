"""A catalogue of 50 features."""

from benchmarks.catalogues import declare

globals().update(declare(measures=5, windows=5))
