"""The heap of the process: how its allocator shares and returns memory."""

import ctypes

_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, where the allocator can; call it before there are threads.

    glibc otherwise gives threads heaps of their own, of which ``return_free_memory`` cannot return the end: up to
    64 MiB each.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Return to the system what the allocator holds, where it can."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
