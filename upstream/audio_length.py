"""How long the content of an audio file is, against what its header says.

libsndfile believes a header's count, or estimates it (MP3), and decodes no further. Here the
containers are walked, which costs a few reads: a count that the content does not bear out is told,
whether it is too large (a file cut off) or too small (a stream, or files joined by `cat`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import soundfile

from upstream import mpeg

# sox and ffmpeg write this or more as the data size when they write to a pipe
STREAMED = 0x7FFFF000
PADDING = 4096  # bytes of zeros that may fill up the end of a file
AGAIN = "decode it with ffmpeg or sox and write it again"
CUT = "truncated, {} of {} {} are there; copy it again"
# chunks behind the audio, which may be cut off without harm
TAGS = frozenset(b"LIST id3  ID3  bext iXML axml _PMX cue  smpl PEAK JUNK".split(b" ")) | {
    b"id3 ", b"ID3 ", b"cue ", b"PAD ", b"TAG", b"ANNO", b"NAME", b"AUTH", b"(c) ",
}  # fmt: skip
STARTS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b"riff")  # of a further file
# kinds of samples of which a packet of AIFF has one
SINGLE = frozenset("PCM_S8 PCM_U8 ULAW ALAW PCM_16 PCM_24 PCM_32 FLOAT DOUBLE".split())
OGG_LONGEST = {b"\x01vorbis": 8192, b"OpusHead": 5760}  # samples of one packet
OGG_UNFINISHED = (1 << 64) - 1  # the position of a page in which no packet ends


def wrong_length(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    """The fault of a header's count and its cure; "" if the content of `size` bytes bears it out.

    content: the open file itself.
    """
    check = CHECKS.get(file.format)
    return check(file, content, size) if check else ""


class Chunks(NamedTuple):
    """How a container writes its chunks."""

    head: str  # format of a chunk's name and size
    first: int  # where the first one begins
    audio: bytes  # how the name of the chunk with the samples begins
    multiple: int = 2  # chunks begin at multiples of so many bytes
    whole: bool = False  # the size counts the name and itself
    frames_of: int = 0  # bytes of the audio chunk that come before its samples


RIFF = Chunks("<4sI", 12, b"data")
RIFX = Chunks(">4sI", 12, b"data")
AIFF = Chunks(">4sI", 12, b"SSND", frames_of=8)
W64 = Chunks("<16sQ", 40, b"data", 8, True)
CAF = Chunks(">4sQ", 8, b"data", 1)


def _of_riff(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    content.seek(0)
    start = content.read(28)
    length = None
    if start[:4] == b"RF64" and start[12:16] == b"ds64":
        (length,) = struct.unpack_from("<Q", content.read(8))
    return _of_chunks(content, size, RIFX if start[:4] == b"RIFX" else RIFF, length)


def _of_aiff(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    fault = _of_chunks(content, size, AIFF)
    if fault or file.subtype not in SINGLE:
        return fault
    for name, place, length in _chunks(content, size, AIFF):
        if name == b"COMM" and length >= 18:
            content.seek(place + 2)
            (frames,) = struct.unpack(">I", content.read(4))
            if frames not in (0, file.frames):  # 0: written to a pipe
                return _mismatch(frames, file.frames, "samples")
    return ""


def _of_w64(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    return _of_chunks(content, size, W64)


def _of_caf(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    return _of_chunks(content, size, CAF)


def _of_chunks(content: BinaryIO, size: int, how: Chunks, length: int | None = None) -> str:
    """The audio must be all there, and whatever comes behind it must be chunks.

    length: of the audio in bytes, where another chunk says it.
    """
    heard, end = -1, how.first
    for name, place, claimed in _chunks(content, size, how, length):
        if name.startswith(how.audio):
            if heard >= 0:
                return f"has several pieces of audio; {AGAIN}"
            heard, end = claimed, place + claimed
            if claimed >= STREAMED and end > size and length is None:
                return ""  # up to the end, however long that is
            if end > size:
                return CUT.format(size - place, claimed, "bytes of audio")
        elif heard >= 0 and name[:4] in STARTS:
            return f"is several files joined together; {AGAIN}"
        elif place + claimed <= size or name[:4] in TAGS:
            end = max(end, place + claimed)
    if heard < 0 or size - end < 8:
        return ""
    content.seek(end)
    rest = content.read(PADDING + 1)
    if _only_tags(rest):
        return ""
    return (
        f"its header says {heard - how.frames_of} bytes of audio, and {size - end} bytes that are "
        f"no chunk come behind them: the size is wrong; repair it with sox --ignore-length"
    )


def _chunks(
    content: BinaryIO, size: int, how: Chunks, audio: int | None = None
) -> Iterator[tuple[bytes, int, int]]:
    """Name, place of the content and size of each, as far as they look like chunks."""
    head, place, odd = struct.calcsize(how.head), how.first, 0
    while place + head <= size:
        content.seek(place)
        name, length = struct.unpack(how.head, content.read(head))
        if not name[:4].isascii() or not name[:4].decode().isprintable():
            if not odd:
                return
            place, odd = place - odd, 0  # written without the filling byte
            continue
        if how.whole:
            length = max(0, length - head)
        if name.startswith(how.audio) and audio is not None:
            length = audio
        yield name, place + head, length
        place += head + length
        odd = -place % how.multiple
        place += odd


def _of_au(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    content.seek(0)
    start = content.read(12)
    place, length = struct.unpack((">" if start[:4] == b".snd" else "<") + "II", start[4:])
    if length >= STREAMED and place + length > size:  # 0xffffffff: written to a pipe
        return ""
    return _mismatch(length, size - place, "bytes of audio")


def _of_nist(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    content.seek(0)
    for line in content.read(4096).partition(b"end_head")[0].split(b"\n"):
        words = line.split()
        if words[:2] == [b"sample_count", b"-i"] and words[2:3] and words[2].isdigit():
            return _mismatch(int(words[2]), file.frames, "samples")
    return ""


def _mismatch(claimed: int, length: int, what: str) -> str:
    """The fault of a header that claims so much, where there is `length` of it."""
    if claimed == length:
        return ""
    if claimed > length:
        return CUT.format(length, claimed, what)
    return f"its header says {claimed} {what}, but {length} are there; {AGAIN}"


def _of_ogg(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    """One stream, no page missing, positions that grow as packets do, an end (RFC 3533)."""
    with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = number = position = 0
        longest = OGG_LONGEST.get(data[28:35], OGG_LONGEST.get(data[28:36], 0))
        flags = 0
        while place < size:
            page = data[place : place + 27 + 255]
            if page[:4] != b"OggS" or len(page) < 27:
                return "" if flags & 4 and _only_tags(data[place:]) else _CUT_OGG
            flags, at, _, order, _, count = struct.unpack_from("<BQIIIB", page, 5)
            lacing = page[27 : 27 + count]
            if flags & 2 and place:
                return f"is several streams or files joined together; {AGAIN}"
            if order != number:
                return f"page {number} is missing; copy it again"
            if at != OGG_UNFINISHED:
                most = (count + 1 - lacing.count(255)) * longest
                if at < position or (position and longest and at - position > most):
                    return f"its pages are not of one length with their positions; {AGAIN}"
                position = at
            place += 27 + count + sum(lacing)
            number += 1
        return "" if flags & 4 and place == size and count else _CUT_OGG


_CUT_OGG = "truncated, its last page does not end the stream; copy it again"


def _only_tags(rest: bytes) -> bool:
    """Whether the end of a file is an ID3v1 tag, or filled up with zeros."""
    tag = rest.startswith(b"TAG") and len(rest) == 128
    return tag or (len(rest) <= PADDING and not any(rest))


def _of_flac(file: soundfile.SoundFile, content: BinaryIO, size: int) -> str:
    """The last frame's number must be that of STREAMINFO's count (RFC 9639)."""
    with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data[:10]
        first = mpeg.tag_size(start) if start.startswith(b"ID3") else 0
        info = data[first : first + 42]
        if info[:4] != b"fLaC" or len(info) < 42:
            return ""
        place = first
        while (place := data.find(b"fLaC", place + 4)) >= 0:
            if data[place + 4 : place + 8] in (b"\0\0\0\x22", b"\x80\0\0\x22"):
                return f"is several files joined together; {AGAIN}"
        least, block = struct.unpack_from(">HH", info, 8)
        width = 1 + (((info[20] & 1) << 4) | (info[21] >> 4))
        window = block * file.channels * (width + 7) // 8 + block + 64
        last = size - (128 if size > 128 and data[size - 128 : size - 125] == b"TAG" else 0)
        ends: list[tuple[int, int]] = []
        for place in _flac_frames(data, max(first + 42, last - window), last):
            end = _flac_end(data, place, least)
            if end == file.frames and not ends:
                return ""
            if end is not None:
                ends.append((place, end))
        # random bytes may look like a frame: one of them must be whole
        whole = [end for place, end in ends if not _crc16(data[place:last])]
        if whole:
            return _mismatch(file.frames, whole[0], "samples")
        if any(end == file.frames for _, end in ends):
            return ""
        return f"truncated, its last frame is not the end of {file.frames} samples; copy it again"


def _flac_frames(data: mmap.mmap, first: int, last: int) -> Iterator[int]:
    """Places that may be a frame's, from the end."""
    place = last
    while (place := data.rfind(b"\xff", first, place)) >= 0:
        if data[place + 1 : place + 2] in (b"\xf8", b"\xf9"):
            yield place


def _flac_end(data: mmap.mmap, place: int, block: int) -> int | None:
    """The sample after the frame that begins here; None if none does."""
    head = data[place : place + 16]
    if len(head) < 6 or head[2] >> 4 == 0 or head[2] & 15 == 15 or head[3] >> 4 > 10 or head[3] & 1:
        return None
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # leading ones: how UTF-8 writes a number
    if ones == 1 or ones > 7:
        return None
    number = head[4] & (0x7F >> ones)
    at = 5 + max(0, ones - 1)
    for byte in head[5:at]:
        number = number << 6 | byte & 0x3F
    code, rate = head[2] >> 4, head[2] & 15
    more = {6: 1, 7: 2}.get(code, 0)
    if more:
        length = int.from_bytes(head[at : at + more], "big") + 1
    else:
        length = {1: 192}.get(code) or (576 << code - 2 if code < 6 else 256 << code - 8)
    at += more + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    return (number if head[1] & 1 else number * block) + length


def _table(polynomial: int, bits: int) -> list[int]:
    """CRCs of single bytes."""
    top, mask, table = 1 << bits - 1, (1 << bits) - 1, []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = (crc << 1 ^ (polynomial if crc & top else 0)) & mask
        table.append(crc)
    return table


_CRC8, _CRC16 = _table(0x07, 8), _table(0x8005, 16)


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc


def _crc16(data: bytes) -> int:
    """0 of a frame with its checksum behind it."""
    crc = 0
    for byte in data:
        crc = (crc << 8 & 0xFFFF) ^ _CRC16[crc >> 8 ^ byte]
    return crc


CHECKS: dict[str, Callable[[soundfile.SoundFile, BinaryIO, int], str]] = {
    "WAV": _of_riff,
    "WAVEX": _of_riff,
    "RF64": _of_riff,
    "AIFF": _of_aiff,
    "W64": _of_w64,
    "CAF": _of_caf,
    "AU": _of_au,
    "NIST": _of_nist,
    "OGG": _of_ogg,
    "FLAC": _of_flac,
}
