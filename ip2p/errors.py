"""Every error a user may meet, as one tree. A message names what was wrong, where, and what to do.

Ip2pError
├── InputError        a caption file, manifest or option cannot be used
│   ├── RecipeError   an unknown or ill-typed recipe field
│   └── PictureError  a file that holds no picture that can be used
├── StorageError      a folder or bucket cannot be read or written (no rights, no route, disk full)
├── CheckpointError   weights are missing, cut short, altered or of the wrong shape
├── DatasetError      a dataset folder is incomplete or inconsistent
├── WriterError       a triplet writer (language model or HTTP endpoint) failed for good
├── TrainingError     a training run cannot go on (its loss is no longer a number)
├── EditError         one edit failed, its neighbours did not
│   ├── DeadlineError     it was not done in time
│   └── QueueFullError    it was not taken in
│       └── EngineClosedError    because the engine is ending
├── DeviceError       the accelerator or what drives it failed; the process that used it must end
└── JobError          a job cannot go on, or finished without some of its shards
"""

from __future__ import annotations


class Ip2pError(Exception):
    """Base of all errors that ip2p raises on purpose; the command line prints it without a traceback."""


class InputError(Ip2pError):
    """Something the user passed in cannot be used; the message names file, line and remedy."""


class RecipeError(InputError):
    """A recipe field that does not exist or has a value of the wrong type or range."""


class PictureError(InputError):
    """A file that cannot be used as a picture. ``kind``: format (another one), size (too large) or damaged."""

    def __init__(self, message: str, kind: str = "damaged"):
        super().__init__(message)
        self.kind = kind


class StorageError(Ip2pError):
    """Reading or writing a folder or bucket failed; the message names the place and the remedy.

    ``kind`` is for who must decide whether to go on: missing (no such file), name (none can have that name there),
    denied (no right to it), refused (the keys themselves are wrong or have expired), full, away (out of reach or
    overloaded: try again) or other.
    """

    def __init__(self, message: str, kind: str = "other"):
        super().__init__(message)
        self.kind = kind

    @property
    def is_of_one_file(self) -> bool:
        """Whether other files of the same place may well be read."""
        return self.kind in ("missing", "denied", "name")


class CheckpointError(Ip2pError):
    """Weights that must not be used: the message says what was found, what was expected and what to do."""


class DatasetError(Ip2pError):
    """A dataset folder is incomplete or inconsistent with its manifest."""


class WriterError(Ip2pError):
    """A triplet writer cannot go on (endpoint gone, key refused, budget spent)."""


class TrainingError(Ip2pError):
    """Training cannot go on; the message names the step and what to change. The last whole checkpoint is untouched."""


class EditError(Ip2pError):
    """An edit failed by itself; others that shared its calls are unharmed."""


class DeadlineError(EditError):
    """An edit was not done by its deadline and was dropped."""


class QueueFullError(EditError):
    """An edit was not taken in because too much work waits; ``retry_after_s`` says when that should be over."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosedError(QueueFullError):
    """The engine takes nothing in any more; another may."""


class DeviceError(Ip2pError):
    """Every later call of the accelerator, or of the engine on it, fails too; another process must take over."""


class JobError(Ip2pError):
    """The cluster is out of reach, or shards failed in a way that nothing foresaw; the others are finished."""
