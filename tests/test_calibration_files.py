"""Data files are recognised by content; what is not UTF-8 text is refused by what it is, with its line."""

import bz2
import gzip
import json
import lzma
import sys

import pytest
from conftest import naming

from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.data_files import read_data_file, read_documents

ROW = {"instruction": "天空为什么是蓝色的？", "output": "因为空气散射蓝光。"}
LINE = json.dumps(ROW, ensure_ascii=False).encode() + b"\n"
ARRAY = json.dumps([ROW, ROW]).encode()
DOCUMENT = [Turn(ROW["instruction"], ROW["output"])]
CHINESE = "天空为什么是蓝色的？因为空气散射蓝光。我们今天去北京看朋友。\n" * 9
TRADITIONAL = "天空為什麼是藍色的？因為空氣把藍光散射得更多。我們今天去臺北看朋友。\n" * 9


def zipped(data):
    """gzip without a time, so that the tests of every process have the same names."""
    return gzip.compress(data, mtime=0)


def documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return read_documents(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [
    ("rows.txt", LINE * 2), ("rows.JSONL", LINE * 2), ("rows", LINE * 2), ("rows.data", b"\n" + LINE * 2),
    ("array.txt", ARRAY), ("array.jsonl", ARRAY), ("array.JSON", b"\xef\xbb\xbf" + ARRAY), ("lines.json", LINE * 2),
    ("joined.jsonl", (b"\xef\xbb\xbf" + LINE) * 2), ("windows.txt", LINE.replace(b"\n", b"\r\n") * 2),
    ("indented.json", json.dumps(ROW, indent=2).encode() * 2),
    ("wrapped.json", json.dumps({"data": [ROW, ROW]}).encode()),
    ("wrapped.jsonl", json.dumps({"version": "1", "n": 2, "splits": [], "rows": [ROW, ROW]}, indent=1).encode()),
    ("wrapped.txt", json.dumps({"conversations": [ROW, ROW]}).encode()),
    ("rows.jsonl.gz", zipped(LINE * 2)), ("rows.jsonl", zipped(ARRAY)), ("rows.bz2", bz2.compress(ARRAY)),
    ("rows.txt.xz", lzma.compress(LINE * 2))])
def test_rows_are_recognised_by_content(tmp_path, name, content):
    assert documents(tmp_path, name, content) == ([DOCUMENT, DOCUMENT], [])


@pytest.mark.parametrize("row", [
    ROW | {"history": [["a", "b"]]}, {"messages": [{"role": "user", "content": "a"}]},
    {"conversation": [{"human": "a", "assistant": "b"}], "tags": [], "id": "1"}, {"text": "a", "labels": [1]}])
def test_file_of_one_row_is_not_taken_for_a_wrapper(tmp_path, row):
    (tmp_path / "row.json").write_text(json.dumps(row))
    assert [value for _, value in read_data_file(tmp_path / "row.json").rows] == [row]


@pytest.mark.parametrize("text", ["78×3=？", "请计算：97×4", "Write École.", "Calculate 45×6."])
def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path, text):
    content = text.encode()
    for place in range(len(content)):
        for byte in (0x80, 0xB0, 0xC4, 0xE5, 0xFF):
            damaged = content[:place] + bytes([byte]) + content[place + 1 :]
            if damaged.decode("utf-8", "ignore").encode() != damaged:
                with pytest.raises(InputError) as caught:
                    documents(tmp_path, "a.txt", damaged)
                assert "-f " not in str(caught.value)


def test_unusual_names_of_plain_text_are_reported(tmp_path):
    assert documents(tmp_path, "a.txt", b"[1] A footnote.\nText.") == (["[1] A footnote.\nText."], [])
    assert documents(tmp_path, "strings.txt", b'["a", "b"]') == (["a", "b"], [])
    text, [note] = documents(tmp_path, "a.log", b"Text.\r\nMore.")
    assert text == ["Text.\nMore."]
    assert "a.log" in note


@pytest.mark.parametrize(("name", "content", "named"), [
    ("gbk.jsonl", b'{"text": "a"}\n' + LINE.decode().encode("gbk"), ("line 2", "iconv -f GB18030")),
    ("gbk.txt", CHINESE.encode("gbk"), ("line 1", "iconv -f GB18030")),
    ("big5.txt", TRADITIONAL.encode("big5"), ("line 1", "iconv -f BIG5")),
    ("marked.jsonl", LINE.decode().encode("utf-16"), ("line 1", "iconv -f UTF-16LE")),
    ("unmarked.txt", CHINESE.encode("utf-16-be"), ("line 1", "iconv -f UTF-16BE")),
    ("ascii.txt", ("hello world\n" * 9).encode("utf-16-le"), ("line 1", "iconv -f UTF-16LE")),
    ("marked32.txt", CHINESE.encode("utf-32"), ("line 1", "iconv -f UTF-32LE")),
    ("latin.txt", b"one\ntwo caf\xe9", ("line 2", "Windows-1252")),
    ("cut.txt", CHINESE.encode() + b"\xe4\xbd\n", ("line 10", "byte")),
    ("half.jsonl", LINE + b'{"text": "a\\ud83d"}\n', ("line 2", "surrogate")),
    ("half.txt", LINE * 2 + b'{"instruction": "\\ude00", "output": "a"}', ("line 3", "surrogate")),
    ("encoded.jsonl", b'{"text": "a\xed\xa0\xbd"}', ("line 1", "UTF-8"))])
def test_text_that_is_not_unicode_is_refused_with_its_line(tmp_path, name, content, named):
    with pytest.raises(InputError, match=naming(tmp_path / name, *named)):
        documents(tmp_path, name, content)


@pytest.mark.parametrize(("name", "content", "kind"), [
    ("cut.jsonl", b"PAR1" + bytes(range(256)), "Parquet"), ("bad.gz", zipped(CHINESE.encode())[:-9], "gzip"),
    ("twice.gz", zipped(zipped(LINE)), "gzip"), ("rows.xlsx", b"PK\x03\x04\xff\xff", "ZIP"),
    ("rows.zst", b"\x28\xb5\x2f\xfd\xaa", "Zstandard"), ("a.txt", b"%PDF-1.4\n\xff", "PDF"),
    ("rows.csv", b"a,b\n1,2\n", "CSV"), ("rows.TSV", b"a\tb\n", "TSV"),
    ("rows.txt", b'"instruction","output"\na,b\n', "CSV"),
    ("empty.gz", zipped(b""), "no text"), ("python.txt", b"{'text': 'a'}\n", "line 1"),
    ("array.txt", b'[{"text": "a"}, {"te', "line 1"), ("broken.txt", LINE * 2 + b'{"text": \n' + LINE, "line 3")])
def test_other_files_are_refused_by_what_they_are(tmp_path, name, content, kind):
    with pytest.raises(InputError, match=naming(tmp_path / name, kind)):
        documents(tmp_path, name, content)


@pytest.mark.parametrize("content", [b"[" * 100_000 + b"]" * 100_000, b'{"text": ' * 100_000,
                                     b'{"text": "a", "b": ' + b"[" * 100_000], ids=["array", "objects", "extra"])
@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_deep_nesting_is_refused(tmp_path, content, suffix):
    with pytest.raises(InputError, match=naming(tmp_path / f"deep{suffix}", "line 1")):
        documents(tmp_path, f"deep{suffix}", content)


def test_parquet_without_pyarrow_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=naming(tmp_path / "rows.jsonl", "Parquet", "pyarrow")):
        documents(tmp_path, "rows.jsonl", b"PAR1" + bytes(64) + b"PAR1")


def test_parquet_is_read_with_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pyarrow.table({"messages": [messages, messages]}), tmp_path / "rows.parquet")
    assert read_documents(tmp_path / "rows.parquet").documents == [[Turn("a", "b")]] * 2
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    with pytest.raises(InputError, match=naming(tmp_path / "bad.parquet")):
        read_documents(tmp_path / "bad.parquet")
