"""Tests; the folder is a package so that `tests.support` has one name everywhere."""
