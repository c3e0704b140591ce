"""Where what is kept between runs lies: compiled kernels, rates, captures and converted models."""

import os
import stat
import tempfile
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """``DBATTN_CACHE``, or a folder in the user's cache; where that cannot be made, see ``private_folder``."""
    if chosen := os.environ.get("DBATTN_CACHE"):
        return Path(chosen)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbattn"
    except RuntimeError:
        return private_folder("the user has no home folder")
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    # A cache that was filled beforehand serves, even where nothing can be added to it.
    if there.is_dir() and (there == folder or os.access(there, os.W_OK | os.X_OK)):
        return folder
    return private_folder(f"{folder} cannot be made")


def private_folder(why: str) -> Path:
    """A folder of this user's among the temporary files, in place of a cache that cannot be had; warns that it is used.

    Raises:
        PermissionError: it is somebody else's, or others may write to it: compiled code and models are read from there.
        FileNotFoundError: there is no folder for temporary files.
    """
    choose = "set DBATTN_CACHE (and for compiled kernels alone NUMBA_CACHE_DIR) to a folder that can be written"
    try:
        folder = Path(tempfile.gettempdir()) / f"dbattn-{os.getuid()}"
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{why}, and there is no folder for temporary files: {choose}") from error
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{why}, and {folder} is not this user's alone: {choose}")
    warnings.warn(f"{why}: {folder} is used instead; {choose}", stacklevel=3)
    return folder
