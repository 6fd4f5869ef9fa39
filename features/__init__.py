"""The language, the aggregations and the kernel: pure, no I/O.

Users import `headrace`, which re-exports the language.
"""
