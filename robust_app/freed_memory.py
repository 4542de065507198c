"""Memory of large tensors on the CPU, kept for the next ones."""

import ctypes

# Of <malloc.h>:
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have the C library reuse the memory of freed tensors in place of returning it.

    By default glibc asks the system for the memory of each large tensor and gives it back when
    the tensor dies; the system clears every page of it, each time. A training step makes and drops
    hundreds of them. The process's resident memory then stays at its peak until it ends.

    Returns:
        Whether the C library took the setting: False with other libraries than glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no such library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
