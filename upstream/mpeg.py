"""MPEG audio (MP3) without a count of its frames: they are counted, for libsndfile only estimates.

Frames as in ISO 11172-3 and 13818-3, the count in a first frame as the Xing encoder wrote it and
LAME does (`Xing`, or `Info` at a constant rate).
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

from upstream.common.errors import UserError

RATES = {  # kbit/s by index, of (version 1 or not, layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLING = (44100, 48000, 32000)  # Hz in version 1; a half in version 2, a quarter in 2.5
ALIKE = 0xFFFE0C00  # the bits of a header that all frames of a stream share: version, layer, rate
COUNTED = 1  # flag of a Xing header that has the number of frames


class Frame(NamedTuple):
    """What a frame's header says."""

    size: int  # bytes
    samples: int
    layer: int
    xing: int  # where in the frame a Xing header would stand


class Stream(NamedTuple):
    """An MPEG file as its frames are."""

    first: int  # where the first frame begins
    end: int  # after the last
    frames: int  # without the one that only counts them
    samples: int  # of a frame
    claimed: int | None  # the count in the first frame; None without one
    header: int  # of the first frame

    @property
    def length(self) -> int:
        """Samples of all frames, those included that an encoder adds at both ends."""
        return self.frames * self.samples


def tag_size(start: bytes) -> int:
    """Bytes of an ID3v2 tag, which begins a file."""
    a, b, c, d = start[6:10]
    return 10 + (a << 21 | b << 14 | c << 7 | d) + 10 * (start[5] >> 4 & 1)


def frame(header: int) -> Frame | None:
    """A frame from its four bytes; None if these are no header, or of a free bit rate."""
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    index, rate = header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = SAMPLING[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits, padding = 1000 * RATES[first, layer][index], header >> 9 & 1
    mono = header >> 6 & 3 == 3
    count = 4 + ((17 if mono else 32) if first else (9 if mono else 17))
    if layer == 1:
        return Frame((12 * bits // hertz + padding) * 4, 384, 1, count)
    samples = 576 if layer == 3 and not first else 1152
    return Frame(samples // 8 * bits // hertz + padding, samples, layer, count)


def stream(data: bytes) -> Stream:
    """The frames of a file's content. Raises UserError, without the path, for a damaged one."""
    place, end = 0, len(data)
    while data[place : place + 3] == b"ID3" and len(data) > place + 10:
        place += tag_size(data[place : place + 10])
    if data[-128:-125] == b"TAG":
        end -= 128
    place = _first(data, place, end)
    (header,) = struct.unpack_from(">I", data, place)
    alike, first, frames = header & ALIKE, place, 0
    start = frame(header)
    assert start is not None
    sizes: dict[int, int] = {}  # by the bits that tell it
    while place + 4 <= end:
        (bits,) = struct.unpack_from(">I", data, place)
        size = sizes.get(bits >> 9)
        if size is None:
            what = frame(bits)
            if what is None or bits & ALIKE != alike:
                if what is not None and _follows(data, place + what.size, end, bits & ALIKE):
                    raise UserError("changes its sampling rate or layer; write it again")
                if not _resumes(data, place, end, alike):
                    break  # tags, or what is left of them
                raise UserError(f"damaged at byte {place}; copy it again")
            size = sizes[bits >> 9] = what.size
        if place + size > end:
            raise UserError("truncated, its last frame is cut; copy it again")
        place += size
        frames += 1
    claimed = _claimed(data, first, start)
    if data[first + start.xing : first + start.xing + 4] in (b"Xing", b"Info"):
        frames -= 1
    return Stream(first, place, frames, start.samples, claimed, header)


def counted(data: bytes, found: Stream) -> BinaryIO:
    """The same frames behind one that says how many they are."""
    version, start = found.header >> 19 & 3, frame(found.header)
    assert start is not None
    first = found.first
    if data[first + start.xing : first + start.xing + 4] in (b"Xing", b"Info"):
        first += start.size
    index = 9 if version == 3 else 8  # a rate at which the frame has room
    header = found.header & 0xFFFE0DFF | 1 << 16 | index << 12
    size = frame(header).size  # type: ignore[union-attr]
    count = struct.pack(">I", header).ljust(start.xing, b"\0")
    count += b"Info" + struct.pack(">II", COUNTED, found.frames)
    return io.BytesIO(count.ljust(size, b"\0") + data[first : found.end])


def _first(data: bytes, place: int, end: int) -> int:
    """Where a frame begins that another follows. Raises UserError."""
    while (place := data.find(b"\xff", place, end - 3)) >= 0:
        (header,) = struct.unpack_from(">I", data, place)
        start = frame(header)
        if start and _follows(data, place + start.size, end, header & ALIKE):
            return place
        place += 1
    raise UserError("no frames of MPEG audio, or of a free bit rate; convert it to WAV")


def _follows(data: bytes, place: int, end: int, alike: int) -> bool:
    """Whether a frame of the same kind, or the end, is here."""
    if place + 4 > end:
        return place <= end
    (header,) = struct.unpack_from(">I", data, place)
    return header & ALIKE == alike and frame(header) is not None


def _resumes(data: bytes, place: int, end: int, alike: int) -> bool:
    """Whether two such frames in a row come anywhere behind."""
    while (place := data.find(b"\xff", place + 1, end - 3)) >= 0:
        (header,) = struct.unpack_from(">I", data, place)
        start = frame(header) if header & ALIKE == alike else None
        after = place + start.size if start else end
        if after + 4 <= end and _follows(data, after, end, alike):
            return True
    return False


def _claimed(data: bytes, first: int, start: Frame) -> int | None:
    """The number of frames in a Xing header."""
    place = first + start.xing
    if start.layer != 3 or data[place : place + 4] not in (b"Xing", b"Info"):
        return None
    flags, frames = struct.unpack_from(">II", data, place + 4)
    return frames if flags & COUNTED and frames else None
