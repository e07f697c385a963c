"""How many members and frames are evaluated at a time."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import psutil
import torch

#: bytes of edge tensors up to which members are better evaluated together than one by one on a CPU: while they stay in its cache
CACHE = 2 * 2**20
#: the same for code that hardly stores anything per edge: measured, groups of members are fastest at about 130 MiB and slower at 270
STREAMED = 160 * 2**20
#: copies of an edge tensor that are alive at the peak of an evaluation with forces (measured: 8 to 13)
COPIES = 14
#: share of the free memory that an evaluation may take
SHARE = 0.4

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Plan:
    """Members and frames of one evaluation."""

    members: int
    frames: int


def plan(
    members: int, frames: int, bytes_per_frame: int, device: torch.device, memory: int | None = None, together: int = CACHE
) -> Plan:
    """The fastest split that fits.

    On a CPU members go together up to `together` bytes; on a GPU, whose launches cost more than its arithmetic, as many as fit into
    memory.

    Args: bytes_per_frame: of the largest edge tensor of one member and frame.   memory: bytes to use; what is free when not given.
        together: `CACHE` or `STREAMED`.
    """
    memory = int(SHARE * free_memory(device)) if memory is None else memory
    fitting = max(1, memory // (COPIES * max(1, bytes_per_frame)))  # members x frames
    at_once = fitting if device.type == "cuda" else min(fitting, max(frames, together // max(1, bytes_per_frame)))
    if at_once < frames:
        return Plan(1, _evenly(frames, at_once))
    return Plan(_evenly(members, max(1, at_once // frames)), frames)


def _evenly(count: int, most: int) -> int:
    """Size of the fewest equal groups of at most `most`: 8 in groups of at most 7 go as 4 and 4, not as 7 and 1."""
    return -(-count // -(-count // most))


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, where the C library is glibc.

    Each evaluation takes and frees the same large blocks; handed back to the system, every one of their pages is cleared and
    mapped anew (a quarter of the time of a 40-atom crystal).  Returns: whether it was done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
