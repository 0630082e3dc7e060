"""Work that is spread over processes."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch


def one_core_each(jobs: int) -> ProcessPoolExecutor:
    """So many processes, each of which computes on one core.

    They are spawned: forked ones would inherit torch's threads in an unusable state.
    """
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
