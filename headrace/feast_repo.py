"""What `feast apply` needs of a project's features: one line in any Python file that Feast imports there.

    from headrace.feast_repo import *

It has the objects that `headrace apply` registers, of what HEADRACE_DEFINITIONS names; without them Feast finds none,
and deletes those that there are.
"""

from registry.feast_repo import *  # noqa: F403  # whatever there is
from registry.feast_repo import __all__  # noqa: F401  # star leaves it out
