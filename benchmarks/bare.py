"""A bare FastAPI route that returns a constant: the most that any server on this stack could do.

It runs under uvicorn with the settings of `headrace serve`: uvloop, httptools, no access log, one process.
"""

from __future__ import annotations

import argparse

import uvicorn
from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def constant() -> dict[str, str]:
    """Always the same."""
    return {"status": "ok"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=parser.parse_args().port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
