"""A catalogue of 10 features."""

from benchmarks.catalogues import declare

globals().update(declare(measures=5, windows=1))
