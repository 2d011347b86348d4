"""Read a data file as UTF-8 text: gzip, bzip2 and xz are unpacked; anything else is refused by what it is."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptq_belle.errors import InputError

MAX_UNPACKED_BYTES = 4 << 30  # more is refused: a few megabytes of gzip can unpack to any size
SAMPLE = 20_000  # characters by which an encoding is recognised
COMPRESSED: tuple[tuple[bytes, str, Callable[..., Any]], ...] = (
    (b"\x1f\x8b\x08", "gzip", gzip.open), (b"\xfd7zXZ\0", "xz", lzma.open),
    *((b"BZh%d1AY&SY" % level, "bzip2", bz2.open) for level in range(1, 10)))
SIGNATURES = (  # the first bytes of files that are not text
    (b"PAR1", "a truncated Parquet file"), (b"ARROW1", "an Arrow file"), (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"PK\x03\x04", "a ZIP archive (.zip, .xlsx, .docx, .pt)"), (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x04\x22\x4d\x18", "an LZ4 file"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!\x1a\x07", "a RAR archive"),
    (b"%PDF-", "a PDF document"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3\0", "an SQLite database"), (b"Obj\x01", "an Avro file"), (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"), (b"\x80\x02", "a pickle"), (b"\x80\x03", "a pickle"), (b"\x80\x04", "a pickle"),
    (b"\x93NUMPY", "a NumPy array"))
USUAL = re.compile("[\t\n\r -~\u3000-\u303f\u4e00-\u9fff\uff00-\uffee]")  # ASCII and Chinese text
BOM = b"\xef\xbb\xbf"
BYTE_ORDER_MARKS = ((b"\xff\xfe\0\0", "UTF-32LE"), (b"\0\0\xfe\xff", "UTF-32BE"), (b"\xff\xfe", "UTF-16LE"),
                    (b"\xfe\xff", "UTF-16BE"))
# Codec, iconv's name, and for common characters the range of the first byte and the least second byte.
LEGACY = (("gb18030", "GB18030", 0xB0, 0xD7, 0xA1), ("big5", "BIG5", 0xA4, 0xC6, 0x40))
FEWEST_WIDE = 4  # one damaged byte and the letter after it are a Chinese character too


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is compressed.

    Raises:
        InputError: the file cannot be read, is damaged, or unpacks to more than 4 GiB.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Give a UTF-8 text or JSONL file.") from error
    except ValueError as error:  # a path with a null character
        raise InputError(f"{str(path)!r} cannot be read: {error}", "Give a UTF-8 text or JSONL file.") from error
    kind = next(((name, opened) for magic, name, opened in COMPRESSED if data.startswith(magic)), None)
    return data if kind is None else _unpack(path, data, *kind)


def _unpack(path: Path, data: bytes, name: str, opened: Callable[..., Any]) -> bytes:
    try:
        with opened(io.BytesIO(data)) as file:
            content: bytes = file.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} is a {name} file that cannot be unpacked: {error}",
                         "Fetch or compress it again.") from error
    if len(content) > MAX_UNPACKED_BYTES:
        raise InputError(f"{path} is a {name} file of more than {MAX_UNPACKED_BYTES >> 30} GiB of text",
                         "Give a part of it.")
    return content


def decode_text(path: Path, data: bytes) -> str:
    """The text in a file's bytes, with "\\n" at the end of lines and without a byte order mark.

    Raises:
        InputError: the bytes are not UTF-8 text; names what they are as far as it is recognised, and the line.
    """
    content = data.removeprefix(BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, data, error.start + len(data) - len(content)) from error
    if text.count("\0", 0, SAMPLE) > 0.2 * min(len(text), SAMPLE):  # a stray null character is accepted
        raise _not_text(path, data, data.index(b"\0"))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def signature(data: bytes) -> str | None:
    """What a file that is not text is, by its first bytes; None if they are not known."""
    if data[257:262] == b"ustar":
        return "a tar archive"
    packed = next((f"a {name} file inside of a compressed one" for magic, name, _ in COMPRESSED
                   if data.startswith(magic)), None)
    return packed or next((name for magic, name in SIGNATURES if data.startswith(magic)), None)


def _not_text(path: Path, data: bytes, place: int) -> InputError:
    marked = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    return _refusal(path, data, marked or signature(data) or _utf16(data) or _legacy(data), place)


def _refusal(path: Path, data: bytes, kind: str | None, place: int) -> InputError:
    line = data.count(b"\n", 0, place) + 1
    where = f"{path}, line {line}"
    if kind is None:
        return InputError(f"{where} is not UTF-8 text (byte {place})",
                          "Correct the line, or convert the file from its encoding, such as Windows-1252, with iconv.")
    if kind.startswith(("UTF", "GB", "BIG")):
        return InputError(f"{where} is not UTF-8 text (byte {place}); the file seems to be {kind} text",
                          f"Convert it: iconv -f {kind} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}")
    return InputError(f"{path} is {kind}, not text", "Convert it to UTF-8 text or JSON Lines.")


def _utf16(data: bytes) -> str | None:
    """The name of UTF-16 without a byte order mark, if the bytes are ASCII or Chinese text in it; else None.

    Pairs of Latin letters look like Chinese characters. A line break in UTF-16 has a zero byte, and Latin-1 has none.
    """
    for name in ("UTF-16LE", "UTF-16BE") if b"\0" in data else ():
        text = data[: 2 * (min(len(data), SAMPLE) // 2)].decode(name, errors="replace")
        if text and len(USUAL.findall(text)) > 0.9 * len(text):
            return name
    return None


def _legacy(data: bytes) -> str | None:
    """The name of a Chinese encoding in which most characters are common ones; else None, as for damaged UTF-8."""
    wide_bytes, kept = len(data.translate(None, bytes(range(128)))), len(data.decode("utf-8", "ignore").encode())
    if len(data) - kept < 0.25 * wide_bytes:
        return None
    shares = {}
    for codec, name, first, last, second in LEGACY:
        wide = [char.encode(codec) for char in data.decode(codec, errors="ignore")[:SAMPLE]
                if "\u4e00" <= char <= "\u9fff"]
        try:
            data.decode(codec)
        except UnicodeDecodeError:
            continue
        common = sum(first <= pair[0] <= last and pair[1] >= second for pair in wide)
        shares[name] = common / max(FEWEST_WIDE, len(wide))
    best = max(shares, key=lambda name: shares[name], default=None)
    return best if best and shares[best] > 0.6 else None
