"""A worker process of `headrace stream` or `headrace archive`: it imports everything, and waits to be told to go.

See `streams.supervise`. It says which plan it has claimed shards (or tables) for, once a lane, and which is the newest
that is applied.
"""

from __future__ import annotations

import gc
import signal


def main() -> None:
    """Runs the dataflow once told to, until it is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until there is something to end well.
    gc.set_threshold(100_000)  # To look for cycles among what is imported takes a sixth of the time.
    from config.child import listen, say
    from config.settings import Settings
    from store.plans import watch_newest
    from streams.dataflow import archive_flow, flow, run

    order = listen()
    if order is not None:
        of_work = {"stream": flow, "archive": archive_flow}[order["work"]]
        dataflow = of_work(order["plan"], lambda plan: say(claimed=plan.number))
        watch_newest(Settings(), lambda number: say(newest=number))
        run(dataflow, order["number"], order["addresses"])


if __name__ == "__main__":
    main()
