"""A download ends in the official bytes or in one line; pickled CIFAR is read and never run."""

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import types
import urllib.request

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_files import IDX_NAMES, ROOT, assert_one_line, cifar_files, idx_bytes, images_and_labels

import cqsnn
import train_cq

DATA = np.random.default_rng(0).bytes(200_000)  # four blocks of a transfer
SHA256 = hashlib.sha256(DATA).hexdigest()


class Site(http.server.ThreadingHTTPServer):
    """A web site on the loopback: answers[name](visit, start), and what was asked for."""

    def __init__(self):
        self.answers, self.asked, self.over = {}, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Visit)
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_):
        """A client that hangs up early is no error of the site's."""


class Visit(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, wanted = self.path[1:], self.headers.get("Range", "bytes=0-")
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.server.asked.append((name, start))
        self.server.answers.get(name, failing(404))(self, start)

    def reply(self, status, body=b"", length=None, to="/"):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Location", to)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serving(data, cuts=(), ranges=True):
    """Answers with data[start:]; the connection breaks after cuts[i] bytes of answer i."""
    left = list(cuts)

    def answer(visit, start):
        rest = data[start if ranges else 0 :]
        status = (206 if rest else 416) if ranges and start else 200
        visit.reply(status, rest[: left.pop(0)] if left else rest, len(rest))

    return answer


def failing(status, to="/"):
    return lambda visit, start: visit.reply(status, to=to)


@pytest.fixture
def site(monkeypatch):
    naps = iter(range(40))
    clock = types.SimpleNamespace(sleep=lambda seconds: next(naps))  # StopIteration: no end to it
    monkeypatch.setattr(cqsnn, "time", clock)
    monkeypatch.setenv("no_proxy", "*")
    with Site() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def fetch(site, folder):
    cqsnn.fetch(site.url + "file", folder / "file", len(DATA), SHA256, (seen := []).append)
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_bytes() == DATA
    assert sum(seen) == len(DATA)  # what progress was told


def fails(error, site, folder):
    """One line with the address; return what is kept, which is never under the file's name."""
    with pytest.raises(error) as caught:
        cqsnn.fetch(site.url + "file", folder / "file", len(DATA), SHA256)
    assert_one_line(caught, site.url + "file")
    assert str(caught.value).isprintable()
    assert [path.name for path in folder.iterdir()] in ([], [".file.partial"])
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert kept or not [*folder.iterdir()]  # no empty file is left
    return kept, str(caught.value)


# One file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (1,), (65_536, 65_537, 1), (0, 0, 70_000, 0, 0), (199_999,)])
def test_broken_transfer_goes_on_where_it_broke(cuts, site, tmp_path):
    site.answers["file"] = serving(DATA, cuts)
    fetch(site, tmp_path)
    assert [start for _, start in site.asked] == [0, *itertools.accumulate(cuts)]


def test_next_call_asks_only_for_the_rest(site, tmp_path):
    site.answers["file"] = serving(DATA, (100_000, 0, 0, 0))
    assert fails(ConnectionError, site, tmp_path)[0] == DATA[:100_000]
    site.asked.clear()
    fetch(site, tmp_path)
    assert site.asked == [("file", 100_000)]


def test_two_calls_at_once_do_not_take_each_others_file(site, tmp_path):
    """The second ends; the first gets the whole file."""
    pytest.importorskip("fcntl", reason="this system has no locks of files")
    site.answers["file"] = serving(DATA)

    def second(n):
        if n and not refused:
            refused.append(n)
            with pytest.raises(BlockingIOError, match="another process is downloading it"):
                cqsnn.fetch(site.url + "file", tmp_path / "file", len(DATA), SHA256)

    refused = []
    cqsnn.fetch(site.url + "file", tmp_path / "file", len(DATA), SHA256, second)
    assert refused and (tmp_path / "file").read_bytes() == DATA
    assert len(site.asked) == 1


def test_interrupted_call_keeps_what_came(site, tmp_path):
    def interrupt(n):
        if n:
            raise KeyboardInterrupt

    site.answers["file"] = serving(DATA)
    with pytest.raises(KeyboardInterrupt):
        cqsnn.fetch(site.url + "file", tmp_path / "file", len(DATA), SHA256, interrupt)
    came = (tmp_path / ".file.partial").stat().st_size
    fetch(site, tmp_path)
    assert site.asked == [("file", 0), ("file", came)] and came > 0


@pytest.mark.parametrize("cuts", [(), (70_000,), (70_000, 60_000, 90_000)])
def test_server_that_ignores_ranges_sends_it_all_again(cuts, site, tmp_path):
    site.answers["file"] = serving(DATA, cuts, ranges=False)
    fetch(site, tmp_path)
    assert len(site.asked) == len(cuts) + 1


def test_no_more_than_the_size_is_taken(site, tmp_path):
    site.answers["file"] = serving(DATA + b"more")
    fetch(site, tmp_path)


def test_wrong_bytes_are_refused_with_both_digests_and_deleted(site, tmp_path):
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    site.answers["file"] = serving(wrong)
    kept, text = fails(ValueError, site, tmp_path)
    assert SHA256 in text and hashlib.sha256(wrong).hexdigest() in text and kept == b""


@pytest.mark.parametrize("size", [1, 200_000, 200_001])
def test_wrong_partial_file_costs_one_call(size, site, tmp_path):
    (tmp_path / ".file.partial").write_bytes(bytes([DATA[0] ^ 1]) * size)
    site.answers["file"] = serving(DATA)
    fails(ValueError, site, tmp_path)
    fetch(site, tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("size", [0, 1, 150_000])
def test_file_that_stays_too_short_is_given_up(size, ranges, site, tmp_path):
    site.answers["file"] = serving(DATA[:size], ranges=ranges)
    assert fails(ConnectionError, site, tmp_path)[0] == DATA[:size]
    assert len(site.asked) <= 4  # one that brings something, three that do not


@pytest.mark.parametrize("sent", [None, 0, 70_000], ids=["no answer", "no body", "a part"])
def test_silent_server_is_given_up_and_what_came_kept(sent, site, tmp_path, monkeypatch):
    real = urllib.request.urlopen
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: real(url, timeout=0.1))
    (tmp_path / ".file.partial").write_bytes(DATA[:9])

    def silent(visit, start):
        if sent is not None:
            visit.reply(206, DATA[start : 9 + sent], len(DATA) - start)
        site.over.wait(5)

    site.answers["file"] = silent
    kept = fails(ConnectionError, site, tmp_path)[0]
    assert DATA.startswith(kept) and len(kept) >= 9 + (sent or 0) // 2**16 * 2**16  # whole blocks


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_with_the_range(status, site, tmp_path):
    site.answers |= {"file": failing(status, "/other"), "other": serving(DATA, (70_000,))}
    fetch(site, tmp_path)
    assert [start for name, start in site.asked if name == "other"] == [0, 70_000]


REFUSALS = [*((failing(n), str(n)) for n in (403, 404, 500)), (failing(302, "/file"), "loop")]
REFUSALS += [(failing(302, to), "") for to in ("http://[/", "http://a..b/")]
REFUSALS += [(lambda visit, start: visit.wfile.write(b"\x1b[31m no HTTP\n\n"), "no HTTP")]


@pytest.mark.parametrize("answer, word", REFUSALS)
def test_refusal_is_one_line_and_leaves_nothing(answer, word, site, tmp_path):
    site.answers["file"] = answer
    kept, text = fails(ConnectionError, site, tmp_path)
    assert kept == b"" and word in text


def test_redirect_to_a_file_of_this_machine_is_refused(site, tmp_path):
    (tmp_path / "ours").write_bytes(DATA)
    (tmp_path / "data").mkdir()
    site.answers["file"] = failing(302, (tmp_path / "ours").as_uri())
    assert fails(ConnectionError, site, tmp_path / "data")[0] == b""


# Data sets and the command line -------------------------------------------------------------------


def tar_of(members):
    """A .tar.gz of (name, contents) or (name, type, where the link leads)."""
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as archive:
        for name, *what in members:
            entry = tarfile.TarInfo(name)
            if len(what) == 2:
                entry.type, entry.linkname = what
            entry.size = len(what[0]) if len(what) == 1 else 0
            archive.addfile(entry, io.BytesIO(what[0]))
    return packed.getvalue()


def made_up(name):
    """Small files named like the official downloads, and what load_dataset reads from them."""
    if name in cqsnn.PICKLED:
        folder, files, parts = cifar_files(name)
        members = [(f"{folder}/{file}", data) for file, data in files.items()]
        return {cqsnn.DATASETS[name].archive: tar_of(members)}, parts
    parts = [images_and_labels(n, 10, (28, 28), n) for n in (7, 3)]
    arrays = zip(itertools.chain(*IDX_NAMES), itertools.chain(*parts))
    files = {f"{file}.gz": gzip.compress(idx_bytes(array)) for file, array in arrays}
    return files, [(images[..., None], labels) for images, labels in parts]


def table(files):
    return {file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()}


@pytest.fixture
def publish(site, monkeypatch):
    """Serve made-up files and let the project's tables point to them, or to another source."""

    def publish(name, source=None, cuts=()):
        files, parts = made_up(name)
        dataset = cqsnn.DATASETS[name]._replace(source=source or site.url)
        monkeypatch.setitem(cqsnn.DATASETS, name, dataset)
        monkeypatch.setitem(cqsnn.DOWNLOADS, name, table(files))
        site.answers.update({file: serving(data, cuts) for file, data in files.items()})
        return files, parts

    return publish


def assert_reads(parts, read):
    for (images, labels), (wanted, classes) in zip(read, parts, strict=True):
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert np.array_equal(images, wanted) and labels.tolist() == classes.tolist()


def command(name, folder):
    return ["--dataset", name, "--data-dir", str(folder), "--device", "cpu", "--download"]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_download_brings_each_official_file_once(name, publish, site, tmp_path):
    files, parts = publish(name, cuts=(9,))
    cqsnn.download(name, tmp_path, (seen := []).append)
    assert sum(seen) == sum(map(len, files.values()))
    found = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    assert {file: path.read_bytes() for file, path in found.items()} == files
    assert site.asked == [(file, start) for file in files for start in (0, 9)]
    assert_reads(parts, cqsnn.load_dataset(name, tmp_path))
    site.asked.clear()
    cqsnn.download(name, tmp_path)
    assert site.asked == []
    found[last := list(files)[-1]].unlink()
    arguments = train_cq.parser().parse_args(command(name, tmp_path))
    assert_reads(parts, train_cq.load_data(arguments, np))
    assert site.asked == [(last, 0)]


def assert_refused(status, errors, *says):
    assert status == 2 and errors.startswith("train_cq: ") and errors.count("\n") == 1
    assert [part for part in says if part not in errors] == []


@pytest.mark.parametrize("name, folder", [("mnist", "mnist"), ("cifar10", "")])
def test_without_a_network_files_and_folder_are_named(name, folder, publish, tmp_path, capfd):
    with socket.socket() as nobody:  # bound, and never listening
        nobody.bind(("127.0.0.1", 0))
        files, _ = publish(name, source := f"http://127.0.0.1:{nobody.getsockname()[1]}/")
        status = train_cq.main(command(name, tmp_path))
    assert_refused(status, capfd.readouterr().err, source, f"into {tmp_path / folder}", *files)


def test_digits_are_not_downloaded(tmp_path, capfd):
    status = train_cq.main(command("digits", tmp_path))
    assert_refused(status, capfd.readouterr().err, "download", "digits", "mnist")


LIMITED = """
import resource, sys
import cqsnn, train_cq
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # Python ignores SIGXFSZ: EFBIG follows
source, cqsnn.DOWNLOADS["cifar10"] = eval(sys.argv[1])
cqsnn.DATASETS["cifar10"] = cqsnn.DATASETS["cifar10"]._replace(source=source)
sys.exit(train_cq.main(sys.argv[2:]))
"""


def test_file_that_may_not_grow_leaves_nothing(publish, site, tmp_path):
    tables = repr((site.url, table(publish("cifar10")[0])))
    script = [sys.executable, "-c", LIMITED, tables, *command("cifar10", tmp_path)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert_refused(done.returncode, done.stderr, "too large")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(publish, tmp_path, capfd):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux may mount a small file system")
    try:
        publish("cifar10")
        status = train_cq.main(command("cifar10", tmp_path))
        assert_refused(status, capfd.readouterr().err, "No space left")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Archives -----------------------------------------------------------------------------------------


def cifar10_archive(folder, first, *others):
    """Write the official archive with other members, and `first` in the place of batch 1."""
    inside, files, parts = cifar_files("cifar10")
    (name, data), *members = ((f"{inside}/{file}", data) for file, data in files.items())
    archive = folder / "cifar-10-binary.tar.gz"
    archive.write_bytes(tar_of([*others, *members, (name, *(first or [data]))]))
    return archive, parts


def test_archive_is_read_and_never_unpacked(tmp_path, monkeypatch):
    (data_dir := tmp_path / "data").mkdir()
    monkeypatch.chdir(data_dir)
    evil = [(name, b"x") for name in ("../evil", f"{tmp_path}/evil", "a/../../evil", "way/evil")]
    _, parts = cifar10_archive(data_dir, None, ("way", tarfile.SYMTYPE, ".."), *evil)
    before = sorted(tmp_path.rglob("*"))
    assert_reads(parts, cqsnn.load_dataset("cifar10", data_dir))
    assert sorted(tmp_path.rglob("*")) == before


LINKS = ["/etc/passwd", "../../../../../etc/passwd", "test_batch.bin", "data_batch_1.bin"]
LINKS += [f"cifar-10-batches-bin/{name}" for name in LINKS[2:]]
NO_FILES = [(kind, to) for to in LINKS for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)]
NO_FILES += [(kind, "") for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)]


@pytest.mark.parametrize("kind, to", NO_FILES)
def test_member_that_is_no_plain_file_is_refused(kind, to, tmp_path):
    archive, _ = cifar10_archive(tmp_path, (kind, to))
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("cifar10", tmp_path)
    assert_one_line(caught, archive)


IMPOSSIBLE = [{"size": 2**70}, {"pax_headers": {"GNU.sparse.map": "a"}}]
IMPOSSIBLE += [{"pax_headers": {"GNU.sparse.map": "1,2,3", "GNU.sparse.size": "9"}}]
IMPOSSIBLE += [{"pax_headers": {"size": size}} for size in ("-999999", f"{2**70}")]


@pytest.mark.parametrize("header", IMPOSSIBLE, ids=str)
def test_archive_with_an_impossible_header_is_refused(header, tmp_path):
    entry = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    for name, value in header.items():
        setattr(entry, name, value)
    how = tarfile.PAX_FORMAT if "pax_headers" in header else tarfile.GNU_FORMAT
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(gzip.compress(entry.tobuf(how) + bytes(2048)))
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("cifar10", tmp_path)
    assert_one_line(caught, archive)


# Pickled CIFAR ------------------------------------------------------------------------------------

ARRAY = (  # as Python 2's cPickle and NumPy 1 write uint8 rows of 3,072
    b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
    b"(K\x01K%cM\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T%btb"
)


def opcodes(value, memo):
    """What Python 2's cPickle writes for a value with protocol 2; `memo` counts from 12 on."""
    if isinstance(value, np.ndarray):
        return ARRAY % (len(value), struct.pack("<I", value.size) + value.tobytes())
    put = b"" if isinstance(value, int) else b"r" + struct.pack("<I", next(memo))
    if isinstance(value, int):
        return b"K%c" % value
    if isinstance(value, bytes):
        return b"U%c%b%b" % (len(value), value, put)
    return b"]%b(%be" % (put, b"".join(opcodes(item, memo) for item in value))


def python2_pickle(batch, **raw):
    """A batch as Python 2 wrote it, but for raw opcodes in the place of some values."""
    memo = itertools.count(12)
    items = [(opcodes(key, memo), raw.get(key.decode()) or opcodes(v, memo)) for key, v in batch]
    return b"\x80\x02}q\x01(%bu." % b"".join(itertools.chain(*items))


def python3_pickle(batch, protocol=4):
    return pickle.dumps({key.decode(): value for key, value in batch}, protocol=protocol)


FORMS = {"Python 2": python2_pickle, "protocol 4": python3_pickle}
FORMS["protocol 3"] = functools.partial(python3_pickle, protocol=3)


def batch_of(name, data):
    """The items of a batch of CIFAR's Python version with the records of a file of the other."""
    rows = np.frombuffer(data, np.uint8).reshape(3, -1)
    labels = [(b"fine_labels", rows[:, -3073].tolist()), (b"coarse_labels", rows[:, 0].tolist())]
    labels = [(b"labels", labels[0][1])] if name == "cifar10" else labels
    names = (b"filenames", [b"a_s_%06d.png" % i for i in range(3)])
    return [(b"batch_label", b"1 of 5"), *labels, (b"data", rows[:, -3072:].copy()), names]


def write_pickled(data_dir, name, form=python2_pickle, seed=0):
    """Write CIFAR's Python version; return its folder and what the binary version holds."""
    folder = data_dir / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    _, files, parts = cifar_files(name, seed)
    folder.mkdir()
    for file, data in files.items():
        (folder / file.removesuffix(".bin")).write_bytes(form(batch_of(name, data)))
    return folder, parts


GOOD = batch_of("cifar10", cifar_files("cifar10")[1]["data_batch_1.bin"])


@pytest.mark.filterwarnings("ignore:numpy.core")
def test_our_pickles_are_pickles():
    read = pickle.loads(python2_pickle(GOOD), encoding="bytes")
    assert all(np.array_equal(read[key], value) for key, value in GOOD)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", cqsnn.PICKLED)
def test_pickled_cifar_is_the_binary_one(name, form, tmp_path):
    _, parts = write_pickled(tmp_path, name, form)
    assert_reads(parts, cqsnn.load_dataset(name, tmp_path))


@pytest.mark.parametrize("archived", [False, True], ids=["folder", "tar.gz"])
def test_binary_version_wins(archived, tmp_path):
    write_pickled(tmp_path, "cifar10", seed=5)
    archive, parts = cifar10_archive(tmp_path, None)
    if not archived:
        with tarfile.open(archive) as members:
            members.extractall(tmp_path, filter="data")
        archive.unlink()
    assert_reads(parts, cqsnn.load_dataset("cifar10", tmp_path))


def assert_batch_refused(data, folder, file="data_batch_3"):
    (folder / file).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("cifar10", folder.parent)
    assert_one_line(caught, folder / file)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def executed(marker):
    """Opcodes that make the marker when they are unpickled."""
    touch, text = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    calls = [(os.system, touch), (eval, text), (exec, text), (open, str(marker), "w")]
    calls += [(subprocess.call, ["touch", str(marker)]), (np.memmap, str(marker), "u1", "w+", 0, 9)]
    for f, *arguments in calls:
        evil = type("Evil", (), {"__reduce__": lambda self, f=f, a=arguments: (f, tuple(a))})()
        yield from (pickle.dumps(evil, 2)[2:-1], pickle.dumps(evil, 4)[11:-1])  # 4: STACK_GLOBAL
    yield b"(S%b\nios\nsystem\n" % repr(touch).encode()
    yield b"c__builtin__\neval\n(V%b\ntR" % text.encode()


@pytest.mark.filterwarnings("ignore:numpy.core")
def test_no_pickle_runs_anything(tmp_path):
    folder, _ = write_pickled(tmp_path, "cifar10")
    for value in executed(marker := tmp_path / "marker"):
        data = python2_pickle(GOOD, filenames=value)
        pickle.loads(data, encoding="bytes")
        marker.unlink()  # Python's own unpickler did run it
        assert_batch_refused(data, folder)
        assert not marker.exists()


RAW = {  # opcodes in the place of a value, separated by spaces
    "filenames": r"""
cnumpy\nload\n cnumpy.f2py\ncompile\n cnumpy.core.multiarray\nfromfile\n cbuiltins\ngetattr\n
c_codecs\nencode\n cos\x1b[31m\nsystem\n \x8c\x05numpy\x8c\x0endarray.tofile\x93 Pos.system\n
K\x01Q \x82\x01 \x83\x01\x01 \x84\x01\x01\x01\x01 K\x01r\x00\x00\x00\x01 K\x01p2147483647\n
T\xff\xff\xff\x7f \x8b\xff\xff\xff\x7f ]N}U\x01aK\x01s\x86b U\x01a)R""",
    "labels": r"""
N K\x01 ](K\x01K\x02e ](K\x01K\x02K\x03K\x04e ](K\x01K\x02M\x00\x01e
](K\x01K\x02J\xff\xff\xff\xffe ](K\x01K\x02G?\xf8\x00\x00\x00\x00\x00\x00e ](K\x01K\x02U\x013e
](K\x01K\x02Ne ](](K\x01e](K\x02e](K\x03ee ]q\xff(K\x01K\x02h\xffe""",
    "data": r"""
N U\x01a""",
}
PIXELS = dict(GOOD)[b"data"]
ARRAYS = [PIXELS > 9, PIXELS / 2, PIXELS.astype("i1"), PIXELS.astype(object), PIXELS[:2]]
ARRAYS += [PIXELS.reshape(-1, 3, 32, 32), PIXELS.reshape(1, -1), np.asfortranarray(PIXELS)]
SHAPE = b"(K\x01K\x03M\x00\x0c"
DATAS = [opcodes(PIXELS, None).replace(SHAPE, SHAPE[:3] + n) for n in (b"K\x04M\0\x0c", b"K\x03N")]


def test_pickle_that_is_no_batch_is_refused(tmp_path):
    folder, _ = write_pickled(tmp_path, "cifar10")
    assert_batch_refused(python2_pickle(GOOD, filenames=b"c%b\ny\n" % (b"x" * 9999)), folder)
    for key, values in RAW.items():
        for value in [
            v.encode().decode("unicode_escape").encode("latin-1") for v in values.split()
        ]:
            assert_batch_refused(python2_pickle(GOOD, **{key: value}), folder)
    for array in ARRAYS:
        assert_batch_refused(python3_pickle([*GOOD, (b"data", array)], 3), folder)
    for data in [python2_pickle(GOOD, data=value) for value in DATAS]:
        assert_batch_refused(data, folder)
    for data in (b"", b"N.", b"].", python2_pickle(GOOD[:1] + GOOD[2:]), python2_pickle(GOOD[:2])):
        assert_batch_refused(data, folder)
    for protocol in (0, 1, 2, 5):  # these write bytes or arrays by other functions
        assert_batch_refused(python3_pickle(GOOD, protocol), folder)
    for form in FORMS.values():
        data = form(GOOD)
        for length in [*range(0, len(data), len(data) // 20), len(data) - 1]:
            assert_batch_refused(data[:length], folder)
    (folder / "data_batch_3").write_bytes(python2_pickle(GOOD))
    assert_batch_refused(python2_pickle([*GOOD, (b"labels", [0, 10, 9])]), folder, "test_batch")


@given(form=st.sampled_from(list(FORMS)), place=st.integers(0), flip=st.integers(1, 255))
def test_flipped_byte_is_refused_or_gives_a_batch(form, place, flip):
    data = bytearray(FORMS[form](GOOD))
    start, inside = data.index(PIXELS.tobytes()), PIXELS.size  # pixels have no check: not there
    place %= len(data) - inside
    data[place + (place >= start) * inside] ^= flip
    try:
        images, labels = cqsnn.parse_cifar_pickle("batch", bytes(data), "labels")
    except ValueError as error:
        assert str(error).startswith("batch: ") and str(error).isprintable()
    else:
        assert (images.transpose(0, 3, 1, 2).reshape(3, -1) == PIXELS).all()
        assert (labels != dict(GOOD)[b"labels"]).sum() <= 1


BOMBS = r"""
import cqsnn, test_download as t
def nest(end):  # nine references to nine references to ...: 9**13 items to look at or write out
    return b"(" + b"K\1" * 9 + end + b"q\0" + b"".join(
        b"0(" + (b"h%c" % i) * 9 + end + b"q%c" % (i + 1) for i in range(12))
for data in (
    b"\x80\2})" + b"\x85" * 10**6 + b"K\1s.",  # a key whose hash() takes all of the stack
    t.python2_pickle(t.GOOD, labels=nest(b"l")),
    t.python2_pickle(t.GOOD, data=t.opcodes(t.PIXELS, None).replace(t.SHAPE, b"(K\1" + nest(b"t"))),
):
    try:
        cqsnn.parse_cifar_pickle("batch", data, "labels")
    except ValueError as error:
        print(str(error)[:60])
"""


def test_pickles_made_to_use_all_memory_or_stack_are_refused():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    script = [sys.executable, "-c", BOMBS]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("batch: ") == done.stdout.count("\n") == 3
