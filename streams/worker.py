"""A worker process of `headrace stream`: it imports everything, and waits to be told to go: see `streams.supervise`.

It says which plan it has claimed shards for, once a lane, and which is the newest that is applied.
"""

from __future__ import annotations

import signal

from config.child import listen, say
from config.settings import Settings
from store.plans import watch_newest
from streams.dataflow import flow, run


def main() -> None:
    """Runs the dataflow once told to, until it is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until there is something to end well.
    order = listen()
    if order is not None:
        dataflow = flow(order["plan"], lambda plan: say(claimed=plan.number))
        watch_newest(Settings(), lambda number: say(newest=number))
        run(dataflow, order["number"], order["addresses"])


if __name__ == "__main__":
    main()
