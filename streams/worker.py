"""A worker process of `headrace stream`: it imports everything, and waits on its standard input to be told to go.

What it says there is a line for each lane whose shards it has claimed: the number of its plan.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta

from bytewax._bytewax import cli_main

from streams import dataflow

_EPOCH: timedelta = timedelta(seconds=1)


def main() -> None:
    """Runs the dataflow once told to, until it is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until there is something to end well.
    told = sys.stdin.readline()
    if not told:
        return  # Nobody is left who would tell.
    order = json.loads(told)
    number, addresses = (order["number"], order["addresses"]) if order["addresses"] else (None, None)
    flow = dataflow.flow(lambda plan: os.write(sys.stdin.fileno(), b"%d\n" % plan.number))
    cli_main(  # type: ignore[no-untyped-call]  # it has no types
        flow, process_id=number, addresses=addresses, epoch_interval=_EPOCH
    )


if __name__ == "__main__":
    main()
