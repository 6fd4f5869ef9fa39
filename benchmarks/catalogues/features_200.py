"""A catalogue of 200 features."""

from benchmarks.catalogues import declare

globals().update(declare(measures=10, windows=10))
