"""Forks: the CPU kernels' threads do not survive one."""

# Set in a child that was forked after the CPU kernels had started their threads.
_forked = False


def check_fork() -> None:
    """Raise RuntimeError in a child forked after the CPU kernels had started: OpenMP's threads do not survive a fork.

    The next kernel would hang or end the process.
    """
    if _forked:
        raise RuntimeError(
            "this process was forked after dbattn's CPU kernels had started their threads, which do not survive a "
            'fork: start it with multiprocessing\'s "spawn" or "forkserver" method, or fork before the first call'
        )


def note_fork() -> None:
    """Say, in a forked child, that the CPU kernels' threads were lost."""
    global _forked
    _forked = True
