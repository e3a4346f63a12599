"""Bytes to lines of UTF-8."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from tercet.data.piece import Piece, broken

BLOCK = 1 << 22
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "parquet",
    b"%PDF": "PDF",
}


def lines(file: Path, place: str) -> Iterator[tuple[int, list[str]]]:
    r"""Blocks of ``(number of the first line, lines)``; lines end at ``\n``, ``\r\n`` or ``\r`` and nowhere else.

    Raises:
        InputError: the file is empty, packed, not UTF-8, or has NUL bytes.
    """
    number, offset, rest = 1, 0, b""
    with file.open("rb") as stream:
        while block := stream.read(max(BLOCK, len(rest))):
            if offset == 0 and not rest:
                _magic(block, place)
            block = rest + block
            # Cut after a line end, never between \r and \n.
            cut = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1
            block, rest = block[:cut], block[cut:]
            if block:
                found = _split(block, offset, number, place)
                yield number, found[:-1]
                number, offset = number + len(found) - 1, offset + len(block)
    if rest:
        found = _split(rest, offset, number, place)
        yield number, found if found[-1] else found[:-1]
    elif offset == 0:
        raise broken(place, "the file is empty.")


def read_text(file: Path, place: str) -> Iterator[Piece]:
    """The one column ``text``: a line is a row; blank lines separate and are counted."""
    for first, block in lines(file, place):
        kept = [(first + i, line) for i, line in enumerate(block) if line and not line.isspace()]
        table = pa.table({"text": pa.array([line for _, line in kept], pa.string())})
        numbers = pa.array([number for number, _ in kept], pa.int64())
        yield Piece(place, "line", numbers, table, blank=len(block) - len(kept))


def check_bytes(file: Path, place: str, blocks: int | None = None) -> None:
    """Read the file's first ``blocks`` (null: all) as lines, for the errors that this may raise."""
    for i, _ in enumerate(lines(file, place), start=1):
        if i == blocks:
            return


def _split(block: bytes, offset: int, number: int, place: str) -> list[str]:
    try:
        # utf-8-sig would eat a mark in the middle of the file too: only the first block may have one.
        text = block.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + block.count(b"\n", 0, error.start)
        raise broken(
            place,
            f"line {line}, byte {offset + error.start} (0x{block[error.start]:02x}) is not UTF-8. "
            "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8).",
        ) from None
    if "\0" in text:
        line = number + text.count("\n", 0, text.index("\0"))
        raise broken(place, f"line {line} has a NUL byte. Maybe the file is UTF-16 or binary: save it as UTF-8 text.")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _magic(block: bytes, place: str) -> None:
    for magic, name in MAGIC.items():
        if block.startswith(magic):
            raise broken(place, f"byte 0: this is {name} data under another name. Unpack or convert it to UTF-8 text.")
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise broken(place, "line 1, byte 0: the file is UTF-16, not UTF-8. Save it as UTF-8.")
