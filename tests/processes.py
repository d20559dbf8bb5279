"""Two processes over gloo, for tests of what happens under ``DistributedDataParallel``."""

from collections.abc import Callable, Mapping
import socket
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._pytree import tree_map_only


def two_processes(work: Callable[[int], Mapping[Any, Any]], timeout: float = 180) -> dict[Any, Any]:
    """Run ``work(rank)`` on both ranks of a process group and put the dictionaries they return together.

    ``work`` must be importable (a function of the test module). Both processes have to end well.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(work, rank, port, queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    results: dict[Any, Any] = {}
    for _ in processes:
        results.update(queue.get(timeout=timeout))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return tree_map_only(np.ndarray, torch.from_numpy, results)


def _process(work: Callable[[int], Mapping[Any, Any]], rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = work(rank)
    # arrays, because a queue of tensors needs the sender to stay alive
    queue.put(tree_map_only(torch.Tensor, lambda x: x.detach().numpy(), dict(found)))
    dist.destroy_process_group()
