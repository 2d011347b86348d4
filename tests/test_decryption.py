"""Decryption of BELLE-LLaMA: the key stream against a byte-by-byte implementation, errors, and resuming."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import naming

from gptq_belle.checkpoint import decryption
from gptq_belle.checkpoint.decryption import decrypt, encrypt
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.xor_cipher import CHUNK_BYTES, Key

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


def transcribed(plain: bytes, key: bytes, chunk: int) -> bytes:
    """BELLE's published program, one byte at a time: data and key in chunks, a short chunk of the key repeated."""
    result, data_at, key_at = bytearray(), 0, 0
    while data_at < len(plain):
        data = plain[data_at : data_at + chunk]
        piece = key[key_at : key_at + chunk]
        key_at += len(piece)
        if not piece:
            piece = key[:chunk]
            key_at = len(piece)
        for i, byte in enumerate(data):
            result.append(byte ^ piece[i % len(piece)])
        data_at += chunk
    return bytes(result)


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes()


def publish(folder, name: str, plain: bytes, key: bytes, chunk: int = CHUNK_BYTES):
    """Write an encrypted file with the name and layout of BELLE's files."""
    folder.mkdir(exist_ok=True)
    digest = hashlib.sha256(plain)
    path = folder / f"{name}.{digest.hexdigest()}.enc"
    path.write_bytes(digest.digest() + transcribed(plain, key, chunk))
    return path


def key_file(tmp_path, content: bytes):
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(content)
    return path


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 10 bytes."""
    monkeypatch.setattr(decryption, "CHUNK_BYTES", 10)


@pytest.mark.parametrize("key_bytes", [1, 7, 10, 20, 23, 30])
@pytest.mark.parametrize("plain_bytes", [0, 1, 9, 10, 11, 23, 30, 31, 57, 100])
def test_keystream_equals_the_reference_implementation(tmp_path, small_chunks, plain_bytes, key_bytes):
    plain, key = noise(plain_bytes), noise(key_bytes, 1)
    publish(tmp_path / "enc", "data.bin", plain, key, 10)
    (found,) = decrypt(tmp_path / "enc", tmp_path / "out", key_file(tmp_path, key))
    assert (tmp_path / "out" / "data.bin").read_bytes() == plain
    assert found == ("data.bin", plain_bytes, hashlib.md5(plain).hexdigest(), hashlib.sha256(plain).hexdigest(),
                     "decrypted")


def test_key_offsets_of_23_bytes_in_chunks_of_10(tmp_path):
    key = Key(key_file(tmp_path, bytes(range(23))), 10)
    stream = [np.zeros(10, np.uint8) for _ in range(4)]
    for index, chunk in enumerate(stream):
        key.apply(index, chunk)
    assert [chunk.tolist() for chunk in stream] == [
        list(range(10)), list(range(10, 20)), [20, 21, 22, 20, 21, 22, 20, 21, 22, 20], list(range(10))]


def test_chunks_of_10_mib(tmp_path):
    key, plain = noise(CHUNK_BYTES + 100_003, 1), noise(3 * CHUNK_BYTES + 17)
    tail = np.resize(np.frombuffer(key[CHUNK_BYTES:], np.uint8), CHUNK_BYTES).tobytes()
    stream = np.frombuffer((key[:CHUNK_BYTES] + tail) * 2, np.uint8)[: len(plain)]
    (tmp_path / "enc").mkdir()
    hexdigest = hashlib.sha256(plain).hexdigest()
    (tmp_path / "enc" / f"w.bin.{hexdigest}.enc").write_bytes(
        bytes.fromhex(hexdigest) + (np.frombuffer(plain, np.uint8) ^ stream).tobytes())
    decrypt(tmp_path / "enc", tmp_path / "out", key_file(tmp_path, key))
    assert (tmp_path / "out" / "w.bin").read_bytes() == plain


FILES = {"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"PK\3\4" + noise(400),
         "tokenizer.model": b"\n" + noise(90, 3)}


@pytest.fixture
def published(tmp_path, small_chunks):
    """A downloaded directory: three encrypted files, a plain README and hidden files."""
    for name, plain in FILES.items():
        publish(tmp_path / "enc", name, plain, noise(53, 1), 10)
    (tmp_path / "enc" / "README.md").write_bytes(b"# BELLE")
    (tmp_path / "enc" / ".gitattributes").write_bytes(b"*.enc filter=lfs")
    (tmp_path / "enc" / ".git").mkdir()
    key_file(tmp_path, noise(53, 1))
    return tmp_path


def run(tmp_path, **options):
    return decrypt(tmp_path / "enc", tmp_path / "out", tmp_path / "consolidated.00.pth", **options)


def written(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_directory_is_decrypted(published):
    seen = []
    found = run(published, progress=lambda done, total: seen.append((done, total)))
    assert written(published) == FILES | {"README.md": b"# BELLE"}
    assert {row.name: row.how for row in found} == dict.fromkeys(FILES, "decrypted") | {"README.md": "copied"}
    assert seen[-1][0] == seen[-1][1] == sum(map(len, FILES.values())) + 7
    assert {row.how for row in run(published)} == {"unchanged", "copied"}


def test_directory_round_trip(published):
    run(published)
    key = published / "consolidated.00.pth"
    names = {row.name for row in encrypt(published / "out", published / "again", key)}
    assert names == {path.name for path in (published / "enc").iterdir() if not path.name.startswith(".")}
    for path in (published / "enc").glob("*.enc"):
        assert (published / "again" / path.name).read_bytes() == path.read_bytes()


def test_wrong_key_is_refused_without_output(published):
    key_file(published, noise(53, 2))
    with pytest.raises(InputError, match=naming("consolidated.00.pth")):
        run(published)
    assert set(written(published)) <= {"README.md"}


def test_truncated_file_is_refused_and_others_are_kept(published):
    (path,) = (published / "enc").glob("pytorch_model*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=naming("pytorch_model.bin")):
        run(published)
    assert set(written(published)) == {"README.md", "config.json", "tokenizer.model"}


def test_single_truncated_file_is_refused(published):
    (path,) = (published / "enc").glob("pytorch_model*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=naming(path.name)):
        decrypt(path, published / "out", published / "consolidated.00.pth")
    path.write_bytes(path.read_bytes()[:31])
    with pytest.raises(InputError, match=naming(path, 31)):
        run(published)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "README.md"])
def test_git_lfs_pointer_is_refused(published, name):
    (path,) = (published / "enc").glob(f"{name}*")
    path.write_bytes(LFS)
    with pytest.raises(InputError, match=naming(path, "git-lfs")):
        run(published)


def test_checksum_in_the_name_has_to_match_the_header(published):
    (path,) = (published / "enc").glob("config*")
    path.rename(path.with_name(f"config.json.{'0' * 64}.enc"))
    with pytest.raises(InputError, match=naming("config.json")):
        run(published)


def test_name_without_checksum_uses_the_header(published):
    (path,) = (published / "enc").glob("config*")
    path.rename(path.with_name("config.json.enc"))
    run(published)
    assert written(published)["config.json"] == FILES["config.json"]


@pytest.mark.parametrize("content", [b"", LFS, None])
def test_unusable_key_is_refused(published, content):
    (published / "consolidated.00.pth").unlink()
    if content is not None:
        key_file(published, content)
    with pytest.raises(InputError, match=naming(published / "consolidated.00.pth")):
        run(published)
    assert not (published / "out").exists()


def test_duplicate_names_and_empty_folders_are_refused(published, tmp_path):
    (published / "enc" / "config.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=naming("config.json")):
        run(published)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=naming(tmp_path / "nothing")):
        decrypt(tmp_path / "nothing", tmp_path / "out", tmp_path / "consolidated.00.pth")
    with pytest.raises(UsageError, match=naming(tmp_path / "enc")):
        decrypt(tmp_path / "enc", tmp_path / "enc", tmp_path / "consolidated.00.pth")
    with pytest.raises(InputError, match=naming(".enc")):
        encrypt(tmp_path / "enc", tmp_path / "out", tmp_path / "consolidated.00.pth")


def test_unencrypted_or_missing_source_is_refused(published, tmp_path):
    run(published)
    with pytest.raises(InputError, match=naming(tmp_path / "out", ".enc")):
        decrypt(tmp_path / "out", tmp_path / "again", tmp_path / "consolidated.00.pth")
    with pytest.raises(InputError, match=naming(tmp_path / "nowhere")):
        decrypt(tmp_path / "nowhere", tmp_path / "again", tmp_path / "consolidated.00.pth")
    assert not (tmp_path / "again").exists()
    with pytest.raises(UsageError, match=naming(tmp_path / "consolidated.00.pth")):
        decrypt(tmp_path / "enc", tmp_path / "consolidated.00.pth", tmp_path / "consolidated.00.pth")


@pytest.mark.parametrize("left", [30, 35, 404, 1000])
def test_unfinished_file_is_resumed(published, left):
    partial = published / "out" / "pytorch_model.bin.unfinished"
    partial.parent.mkdir()
    partial.write_bytes((FILES["pytorch_model.bin"] + noise(1000))[:left])
    run(published)
    assert written(published) == FILES | {"README.md": b"# BELLE"}


def test_unfinished_file_of_another_source_is_restarted(published):
    partial = published / "out" / "pytorch_model.bin.unfinished"
    partial.parent.mkdir()
    partial.write_bytes(noise(100, 9))
    run(published)
    assert written(published)["pytorch_model.bin"] == FILES["pytorch_model.bin"]


def test_modified_output_is_decrypted_again(published):
    run(published)
    (published / "out" / "config.json").write_bytes(FILES["config.json"].replace(b"llama", b"bloom"))
    assert {row.name: row.how for row in run(published)}["config.json"] == "decrypted"
    assert written(published)["config.json"] == FILES["config.json"]


def big_publication(tmp_path, count: int, files: int = 1):
    """Write encrypted files of `count` bytes each (the key is longer than the data)."""
    plain, key = noise(count), noise(count + 7, 1)
    key_file(tmp_path, key)
    (tmp_path / "enc").mkdir()
    body = (np.frombuffer(plain, np.uint8) ^ np.frombuffer(key, np.uint8)[:count]).tobytes()
    digest = hashlib.sha256(plain)
    for i in range(files):
        (tmp_path / "enc" / f"part{i}.{digest.hexdigest()}.enc").write_bytes(digest.digest() + body)
    return plain


def command(tmp_path):
    return [sys.executable, "-m", "gptq_belle.cli", "decrypt", str(tmp_path / "enc"), str(tmp_path / "out"), "--key",
            str(tmp_path / "consolidated.00.pth"), "--json"]


def test_killed_decryption_is_resumed(tmp_path):
    plain = big_publication(tmp_path, 6 * CHUNK_BYTES + 5, files=3)
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL)
    partials = [tmp_path / "out" / f"part{i}.unfinished" for i in range(3)]
    while process.poll() is None and not any(p.exists() and p.stat().st_size >= CHUNK_BYTES for p in partials):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert any(partial.exists() for partial in partials)
    assert subprocess.run(command(tmp_path), stdout=subprocess.DEVNULL).returncode == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["part0", "part1", "part2"]
    assert all((tmp_path / "out" / f"part{i}").read_bytes() == plain for i in range(3))


def disk_seconds(tmp_path, count: int) -> float:
    """Time to read the input and to write the output of a decryption, including fsync."""
    began = time.perf_counter()
    data = next((tmp_path / "enc").iterdir()).read_bytes()
    (tmp_path / "consolidated.00.pth").read_bytes()
    with (tmp_path / "written").open("wb") as out:
        out.write(data)
        os.fsync(out.fileno())
    return time.perf_counter() - began


@pytest.mark.slow
def test_one_gigabyte_takes_less_than_5_seconds_more_than_disk_io(tmp_path):
    big_publication(tmp_path, 10**9)
    disk = disk_seconds(tmp_path, 10**9)
    began = time.perf_counter()
    decrypt(tmp_path / "enc", tmp_path / "out", tmp_path / "consolidated.00.pth")
    took = time.perf_counter() - began
    print(f"1 GB: {took:.2f} s, the disk alone {disk:.2f} s")
    assert took < disk + 5
