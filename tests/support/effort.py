"""How much the tests of chance try."""

from __future__ import annotations

import os
from typing import Final

LONG: Final = os.environ.get("HEADRACE_TEST_LONG") == "1"
"""Whether by `make test-long`: all that docs/reliability.md reports."""


def effort(usual: int, long: int) -> int:
    """How many rounds, seeds or examples."""
    return long if LONG else usual
