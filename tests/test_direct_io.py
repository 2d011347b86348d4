"""Reads through the page cache, by direct I/O, and by both: same bytes, alignment, errors."""

import errno
import os

import pytest
import torch

from gptq_belle.checkpoint import direct_io
from gptq_belle.checkpoint.direct_io import PAGE, FileBytes, byte_view, consecutive_runs
from gptq_belle.kernels.huge_pages import MemoryPool, empty_bytes

SIZE = 37 * PAGE + 1234
SPANS = [(0, SIZE), (0, 1), (1, PAGE), (PAGE, PAGE), (PAGE - 1, 2), (5 * PAGE + 7, 20 * PAGE), (SIZE - 1, 1),
         (SIZE - 3 * PAGE, 3 * PAGE), (8, 0), (PAGE * 36 + 8, 1234)]


@pytest.fixture
def content():
    return torch.randint(256, (SIZE,), dtype=torch.uint8)


@pytest.fixture
def path(tmp_path, content, monkeypatch):
    monkeypatch.setattr(direct_io, "LARGE", 0)
    monkeypatch.setattr(direct_io, "PIECE", 4 * PAGE)
    found = tmp_path / "weights"
    found.write_bytes(content.numpy().tobytes())
    forget(found)
    return found


@pytest.fixture
def counted(monkeypatch):
    """Counts bytes read by direct I/O, and can make such reads fail."""
    seen = {"bytes": 0, "error": None}
    plain, flags = os.preadv, {}

    def opened(path, how, open=os.open):
        flags[number := open(path, how)] = how
        return number

    def counting(file, views, begin):
        if flags.get(file, 0) & os.O_DIRECT and seen["error"]:
            raise OSError(seen["error"], os.strerror(seen["error"]))
        count = plain(file, views, begin)
        seen["bytes"] += count if flags.get(file, 0) & os.O_DIRECT else 0
        return count

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", counting)
    return seen


def forget(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def held(path):
    with path.open("rb") as file:
        return direct_io._is_cached(file.fileno(), 0, SIZE)


def needs_a_cache(path):
    if held(path):
        pytest.skip("this file system forgets nothing")


@pytest.mark.parametrize("memory", [empty_bytes, MemoryPool()])
@pytest.mark.parametrize(("begin", "size"), SPANS)
def test_read_returns_the_bytes_of_the_file(path, content, begin, size, memory):
    for state in ("forgotten", "partly held", "held"):
        found = FileBytes(path).read(begin, size, memory)
        assert found.shape == (size,)
        assert torch.equal(found, content[begin : begin + size]), state
        FileBytes(path).fill_cache(0, SIZE if state == "partly held" else 6 * PAGE)


@pytest.mark.parametrize(("begin", "size"), SPANS)
@pytest.mark.parametrize("align", [2, 8])
def test_result_is_aligned_for_its_dtype(path, content, begin, size, align):
    found = FileBytes(path).read(begin, size // align * align, empty_bytes, align)
    assert found.data_ptr() % align == 0
    words = found.view({2: torch.float16, 8: torch.int64}[align])
    assert torch.equal(words.view(torch.uint8), content[begin : begin + size // align * align])


@pytest.mark.parametrize("chosen", [[], [3], [3, 4, 5], [7, 7, 0, 1, 2, 30], list(range(36, -1, -1))])
def test_pieces_are_returned_in_the_requested_order(path, content, chosen):
    whole = content[17 : 17 + 37 * PAGE].view(37, PAGE)
    found = FileBytes(path).pieces(17, PAGE, chosen, empty_bytes)
    assert torch.equal(found.view(-1, PAGE), whole[chosen])


def test_uncached_data_is_read_by_direct_io_and_not_cached(path, counted):
    needs_a_cache(path)
    FileBytes(path).read(PAGE + 8, 20 * PAGE, empty_bytes)
    assert counted["bytes"] == 21 * PAGE
    assert not held(path)


def test_cached_data_is_read_from_the_page_cache(path, counted):
    path.read_bytes()
    assert held(path)
    FileBytes(path).read(0, SIZE, empty_bytes)
    assert counted["bytes"] == 0


def test_small_reads_use_the_page_cache(path, counted, monkeypatch):
    monkeypatch.setattr(direct_io, "LARGE", 2 * PAGE)
    FileBytes(path).read(0, 2 * PAGE - 1, empty_bytes)
    assert counted["bytes"] == 0


def test_slow_disk_is_read_through_the_page_cache(path, content, counted, monkeypatch):
    needs_a_cache(path)
    monkeypatch.setattr(direct_io, "SLOW_DISK", float("inf"))
    monkeypatch.setattr(direct_io, "TRIAL_BYTES", 8 * PAGE)
    assert torch.equal(FileBytes(path).read(0, SIZE, empty_bytes), content)
    assert counted["bytes"] == 8 * PAGE


@pytest.mark.parametrize("refused", ["open", "read"])
def test_file_system_without_direct_io_is_read_through_the_cache(path, content, counted, monkeypatch, refused):
    if refused == "read":
        counted["error"] = errno.EINVAL
    else:
        plain = os.open
        monkeypatch.setattr(os, "open", lambda name, how: plain(name if not how & os.O_DIRECT else "/absent", how))
    file = FileBytes(path)
    for _ in range(2):
        assert torch.equal(file.read(8, SIZE - 8, empty_bytes), content[8:])
    assert counted["bytes"] == 0


@pytest.mark.parametrize("large", [0, 1 << 30])
@pytest.mark.parametrize("left", [0, PAGE, 9 * PAGE + 5])
def test_read_past_the_end_of_a_truncated_file_is_an_error(path, monkeypatch, left, large):
    monkeypatch.setattr(direct_io, "LARGE", large)
    file = FileBytes(path)
    os.truncate(path, left)
    with pytest.raises(EOFError):
        file.read(8, SIZE - 8, empty_bytes)


def test_disk_error_is_raised(path, monkeypatch):
    def failing(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as error:
        FileBytes(path).read(0, SIZE, empty_bytes)
    assert error.value.errno == errno.EIO


@pytest.mark.parametrize(("indices", "expected"), [
    ([], []), ([4], [(0, 1)]), ([4, 5, 6], [(0, 3)]), ([4, 6, 7, 7, 8, 1], [(0, 1), (1, 2), (3, 2), (5, 1)])])
def test_consecutive_indices_are_merged_into_runs(indices, expected):
    assert list(consecutive_runs(indices)) == expected


def test_byte_view_of_an_empty_tensor():
    assert bytes(byte_view(torch.empty(0, 3))) == b""
