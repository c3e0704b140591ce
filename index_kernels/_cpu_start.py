"""What must happen before a CPU kernel is compiled: threads shared with torch, a place to cache, a word to the user."""

# mypy: ignore-errors

import logging
import os
import warnings

# torch's own OpenMP pool: the two alternate at no loss, where Numba's "workqueue" would fight it.
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")

import torch
from numba import config, njit, set_num_threads
from numba.core import event
from numba.np.ufunc.parallel import _launch_threads

from .folders import cache_folder, private_folder
from .fork import note_fork


def _can_cache():
    """Whether Numba finds a folder to keep compiled kernels in; where it does not, it refuses to define one."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


def _cache_in(folder):
    os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")
    config.reload_config()


if not _can_cache():
    _cache_in(cache_folder())
    if not _can_cache():
        _cache_in(private_folder("no cache can be written"))
    warnings.warn(
        "neither the package's folder nor the user's cache can be written: compiled kernels are kept in "
        f"{config.CACHE_DIR} (set NUMBA_CACHE_DIR to choose another)",
        stacklevel=2,
    )

# Numba's pool sets OpenMP's thread count when it starts, which is torch's too: start it now, and put torch's back.
_threads = torch.get_num_threads()
_launch_threads()
torch.set_num_threads(_threads)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)


class Notice(event.Listener):
    """Says once that kernels are being compiled, which takes long; Numba raises no event for one kept on disk."""

    told = False

    def on_start(self, started):
        kernel = started.data["dispatcher"]
        if not (kernel.__module__ or "").startswith("index_kernels"):
            return
        if not Notice.told:
            Notice.told = True
            _log.warning("dbattn: compiling CPU kernels for this machine, kept for later: a minute or two in all")
        if not kernel.targetoptions.get("no_cpython_wrapper"):
            _log.info("dbattn: compiling %s", kernel.__name__)

    def on_end(self, ended):
        pass


_log = logging.getLogger("dbattn")
event.register("numba:compile", Notice())

_threads_set = 0


def use_torchs_threads() -> int:
    """Give Numba as many threads as torch has; returns the parts each KV head's work is cut into, one per thread."""
    global _threads_set
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    if threads != _threads_set:
        set_num_threads(threads)
        _threads_set = threads
    return threads
