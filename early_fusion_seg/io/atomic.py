"""Files and checkpoints that are written completely or not at all."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from early_fusion_seg.errors import UserError

MAX_SUFFIX = 12  # characters of a suffix that a temporary name keeps


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it, so that an interruption leaves no partial file.

    The temporary name is short, so that any name that the file system takes can be written.

    Args:
        path: The file; its folder is created.
        write: Called with the temporary path, which has the suffix of the file.

    Raises:
        OSError: With the name of the file, which the operating system leaves out for a full disk.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    part = path.with_name(f".part-{digest[:16]}{path.suffix[-MAX_SUFFIX:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except BaseException as error:
        _remove(part)
        if isinstance(error, OSError) and error.errno is not None:  # the others do not come from the operating system
            error.filename = str(path)
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file in its own folder, then rename it.

    The file is always the old checkpoint or the new one. Lightning's plugin writes through the system's temporary
    folder, which may be on another, smaller disk. Give this one to a Trainer as `plugins=[AtomicCheckpointIO()]`; the
    command line does.

    Raises:
        UserError: The checkpoint cannot be written; the message says why, and the old file is intact.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file, flush it to the disk, then give it its name."""
        path = Path(path)
        part = path.with_name(f".part-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except BaseException as error:
            _remove(part)
            if _is_interrupt(error):
                raise KeyboardInterrupt from error
            if not isinstance(error, OSError | RuntimeError):
                raise
            cause = error if isinstance(error, OSError) else error.__context__  # torch's writer hides a short write
            reason = cause.strerror if isinstance(cause, OSError) else None
            raise UserError(
                f"the checkpoint {path} could not be written ({reason or error}); what was saved before is intact. "
                "Free space or fix the permissions, then resume with --ckpt_path"
            ) from error


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error: torch's writer raises a RuntimeError when it is interrupted."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _sync_folder(folder: Path) -> None:
    """Flush the new name to the disk, where folders can be opened and synced; the file itself is complete already."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and other systems none that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _remove(part: Path) -> None:
    """Remove a partial file, if it exists."""
    try:
        part.unlink(missing_ok=True)
    except OSError:  # the folder itself cannot be written
        return
