"""The exception tree: whatever dpshm raises on purpose is a `DpshmError`.

    DpshmError
     +-- SegmentError              the shared-memory segment of a group
     |    +-- SegmentNotFound      no such group on this node
     |    +-- SegmentInvalid       wrong magic, version, size or checksum; names both values
     |    +-- SegmentNoSpace       the tmpfs is full or too small
     +-- GroupInUse                another coordinator owns the group
     +-- RowInUse                  a live process holds that engine's or front-end's row
     +-- CapacityExceeded          a rank or an index beyond what the segment was created for
     +-- StartupTimeout            ranks or a child process did not come up in time
     +-- NoEngineAvailable         every engine is absent, dead, stalled, stuck, unknown, drained or excluded
     |    +-- Overloaded           the others have as many requests as `max_requests` allows
     +-- HandleError               a handle used where it must not be
     |    +-- HandleClosed
     |    +-- HandleForked         used in a child of the process that made it
     |    +-- WrongThread          an `Engine` belongs to one thread
     +-- WireError                 a message that is not what the wire says
     +-- SettingError              an option or argument out of range
     |    +-- AddressInUse         another process listens on the port: it may end, so try again
     +-- TooManyFiles              this process has no file descriptor left

Every message says what was found, what was expected, and what to do.
"""

from __future__ import annotations


class DpshmError(Exception):
    """The base of all errors that dpshm raises on purpose."""


class SegmentError(DpshmError):
    """Something about a group's shared-memory segment."""


class SegmentNotFound(SegmentError):
    """No segment of that group exists on this node."""


class SegmentInvalid(SegmentError):
    """The segment is not one that this version can use."""


class SegmentNoSpace(SegmentError):
    """The file system of the segment has no room for it."""


class GroupInUse(DpshmError):
    """A live coordinator, of this user or another, owns the group."""


class RowInUse(DpshmError):
    """A live process holds the row."""


class CapacityExceeded(DpshmError):
    """The segment was created for fewer engines or front-ends."""


class StartupTimeout(DpshmError):
    """Something did not come up before its deadline."""


class NoEngineAvailable(DpshmError):
    """No engine may be chosen: each is absent, dead, stalled, stuck, unknown or drained."""


class Overloaded(NoEngineAvailable):
    """Each engine that may be chosen has as many requests as `max_requests` allows: answer 503 and shed load."""


class HandleError(DpshmError):
    """A handle was used where it must not be."""


class HandleClosed(HandleError):
    """The handle was closed."""


class HandleForked(HandleError):
    """The handle belongs to the parent of this process."""


class WrongThread(HandleError):
    """The handle belongs to another thread."""


class WireError(DpshmError):
    """A message that does not decode to anything the wire knows."""


class SettingError(DpshmError):
    """An option or argument is out of range."""


class AddressInUse(SettingError):
    """Another process listens on the address, which may be free at the next try."""


class TooManyFiles(DpshmError):
    """This process, or the machine, has no file descriptor left."""
