"""Experiments, one after another or side by side; each leaves its JSON and its picture."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from .outcome import Config, Experiment
from .plot import draw
from .report import as_json, write_json


def run_one(experiment: Experiment, config: Config, folder: Path) -> dict[str, Any]:
    """Runs an experiment; what is to be known of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny
    try:
        begin = time.perf_counter()
        outcome = experiment.run(config)
        result = as_json(experiment, config, outcome, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    write_json(result, folder)
    draw(result, folder / f"{experiment.id}.png")
    return result


def run_beside(
    chosen: Sequence[Experiment], config: Config, folder: Path, jobs: int
) -> Iterator[dict[str, Any]]:
    """So many at a time, each in a process of its own; in the order in which they end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(run_one, experiment, config, folder) for experiment in chosen]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
