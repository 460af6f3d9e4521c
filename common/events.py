"""TensorBoard event files that outlive a full disk, a kill and a deleted folder, and can be cut back to a step."""

import io
import itertools
import os
import shutil
import socket
import struct
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from common.checkpoint import write_file


class EventFile:
    """A TensorBoard event file in ``folder`` that goes on where it can.

    Records are written at once and in this thread, so that an error is met where it can be told, and ``kill -9`` cuts
    off one record at most. What can't be written waits in memory until it can. ``after`` is the step (environment
    steps) up to which an earlier process logged: TensorBoard is told to forget what it has seen beyond.
    """

    count = itertools.count()

    def __init__(self, folder, after=None):
        # TensorBoard reads the files of a folder in the order of their names, and a clock may have been set back.
        times = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        now = max([int(time.time()), *(int(x) + 1 for x in times if x.isdecimal())])
        name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}.{os.getpid()}.{next(self.count)}"
        self.path = folder / name
        self.file = open(self.path, "x+b", buffering=0)  # noqa: SIM115
        self.waiting = b""
        self.remade = False
        self._write(Event(file_version="brain.Event:2"))
        if after is not None:
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=after + 1))

    def add_text(self, tag, text, step):
        self._write(Event(summary=summary.text(tag, text), step=step))

    def add_scalars(self, scalars, step):
        """Write ``{tag: number}`` as one record; raises OSError where it has to wait."""
        event = Event(step=step)
        for tag, value in scalars.items():
            event.summary.value.add(tag=tag, simple_value=float(value))
        self._write(event)

    def _write(self, event):
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.waiting += record.getvalue()
        self._flush()

    def _flush(self):
        if not os.fstat(self.file.fileno()).st_nlink:  # deleted, which the open file outlives
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "x+b", buffering=0)  # noqa: SIM115
            self.waiting = os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0) + self.waiting
            self.file.close()
            self.file, self.remade = file, True
        while self.waiting:  # the disk may take a part
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def sync(self):
        """Write what waits, and have it outlive a crash of the machine; raises OSError where it has to wait."""
        self._flush()
        os.fsync(self.file.fileno())

    def close(self):
        """Write what waits; raises OSError if it still can't be written, and is lost."""
        try:
            self._flush()
        finally:
            self.file.close()


def _sound(content, start, length):
    """Whether the checksum after the ``length`` bytes from ``start`` on is theirs."""
    end = start + length
    return struct.pack("<I", masked_crc32c(content[start:end])) == content[end : end + 4]


def drop_events(folder, step):
    """Drop what the event files in ``folder`` hold beyond ``step``, and records that were cut off; damage is said.

    A damaged record goes alone where its length is sound, else with all that follows in its file.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, kept, start, damaged = path.read_bytes(), [], 0, []
        while start + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            if not _sound(content, start, 8):
                damaged.append(f"what comes after byte {start}")
                break
            end = start + 12 + length + 4
            if end > len(content):
                break
            try:
                event = Event.FromString(content[start + 12 : end - 4]) if _sound(content, start + 12, length) else None
            except Exception:  # protobuf has had several names for what it raises
                event = None
            if event is None:
                damaged.append(f"the record at byte {start}")
            elif event.step <= step:
                kept.append(content[start:end])
            start = end
        if damaged:
            shutil.copy(path, path.with_name(path.name.replace("tfevents", "damaged")))
            more = f" (and {len(damaged) - 1} more)" if damaged[1:] else ""
            print(f"{path} is damaged: {damaged[0]}{more} is dropped, and kept in a copy", flush=True)
        if len(kept) > 1:
            write_file(path, b"".join(kept))
        else:  # the first record is the format's version
            path.unlink()
