"""Images in folders, DATA/<domain>/<class>/<image>: PACS, VLCS, OfficeHome and whatever is laid out like them.

Domains, classes and files are taken in sorted order, as DomainBed takes them. Everything that would silently spoil an
experiment is refused: a class that a domain lacks (its labels would shift), nested folders (domains taken for classes),
files that are no images. What other systems leave beside the images (`FOREIGN`, and names that begin with a dot, such
as the AppleDouble file `._0.png`) is passed over, and said once. Needs Pillow, which is imported when a tree is opened.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "DATA/<domain>/<class>/<image>"
FOREIGN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # folders, no data of ours
NAMED = 5  # folders or classes that a message names

logger = logging.getLogger(__name__)


class ImageFolders:
    """The images under `root`, made `side` pixels wide and high when they are read; a `DomainData`.

    ValueError where the tree is not DATA/<domain>/<class>/<image>, where domains differ in their classes, and for a
    file that is read and is no image (`check_headers` looks at all beforehand). ImportError without Pillow.
    """

    def __init__(self, root: Path, side: int) -> None:
        _pillow()
        if not root.is_dir():
            raise ValueError(f"data: {root} is not a folder; expected is {LAYOUT}")
        self.root, self.side = root, side
        folders = {domain.name: _folders(domain) for domain in _folders(root)}
        if flat := [name for name, classes in folders.items() if not classes and _pictures(root / name)]:
            raise ValueError(f"data: {root} has images without classes in {_some(flat)}: {LAYOUT} is expected")
        folders = {name: classes for name, classes in folders.items() if classes}
        if len(folders) < 2:
            found = ", ".join(folders) or "none"
            raise ValueError(
                f"data: {root} must hold a folder for each of at least two domains ({LAYOUT}), got {found}"
            )
        self._classes = _common_classes(root, folders)
        self.files = {name: _files(classes) for name, classes in folders.items()}
        _say_passed_over(root, folders)
        self._labels = {
            name: torch.tensor([self._classes.index(file.parent.name) for file in files])
            for name, files in self.files.items()
        }

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.files)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def fingerprint(self) -> str:
        """A digest of the names of all files: the splits depend on it."""
        names = [file.relative_to(self.root).as_posix() for files in self.files.values() for file in files]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def labels(self, domain: str) -> Tensor:
        """Labels [N] int64: positions in `classes`."""
        return self._labels[domain]

    def images(self, domain: str, index_B: Tensor) -> Tensor:
        """Whole images [B, 3, side, side] fp32, normalised."""
        from dynmoe_tutel.experiments.vision.transforms import for_evaluation

        return torch.stack([for_evaluation(_read(self.files[domain][n]), self.side) for n in index_B.tolist()])

    def training_images(self, domain: str, index_B: Tensor, streams: Sequence[int]) -> Tensor:
        """Augmented images [B, 3, side, side] fp32, normalised."""
        from dynmoe_tutel.experiments.vision.transforms import for_training

        views = []
        for n, seed in zip(index_B.tolist(), streams, strict=True):
            generator = torch.Generator().manual_seed(seed)
            views.append(for_training(_read(self.files[domain][n]), self.side, generator))
        return torch.stack(views)

    def check_headers(self) -> None:
        """ValueError for the first file whose header is none of an image."""
        image = _pillow()
        for files in self.files.values():
            for file in files:
                try:
                    with image.open(file):
                        pass
                except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
                    raise _broken(file, error) from error


def _read(file: Path) -> Image.Image:
    image = _pillow()
    try:
        with image.open(file) as opened:
            return cast("Image.Image", opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise _broken(file, error) from error


class UnreadableImage(ValueError):
    """One line, also where a worker process of a DataLoader hands it over inside a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{UnreadableImage.__name__}: ")[2].strip())


def _broken(file: Path, error: Exception) -> UnreadableImage:
    return UnreadableImage(
        f"data: {file} cannot be read as an image ({error}). Replace it by a whole copy; without it the splits are "
        "others, and a job must be started anew"
    )


def _pillow() -> ModuleType:
    try:
        return import_module("PIL.Image")
    except ImportError as error:
        raise ImportError("images need Pillow, which is not installed: pip install 'dynmoe_tutel[vision]'") from error


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_foreign(entry))


def _is_foreign(entry: Path) -> bool:
    """Whether it is hidden, or a folder that another system left."""
    return entry.name.startswith(".") or (entry.name in FOREIGN and entry.is_dir())


def _say_passed_over(root: Path, folders: dict[str, list[Path]]) -> None:
    """Log the entries of a tree that would be images, domains or classes if they were not foreign."""
    above = [root, *(root / name for name in folders)]
    passed = [entry for folder in above for entry in folder.iterdir() if _is_foreign(entry) and entry.is_dir()]
    for classes in folders.values():
        for folder in classes:
            passed += [e for e in folder.iterdir() if _is_foreign(e) and (e.is_dir() or e.suffix.lower() in EXTENSIONS)]
    if passed:
        names = _some(sorted(entry.relative_to(root).as_posix() for entry in passed))
        logger.warning("data: passed over what is hidden or of another system in %s: %s", root, names)


def _common_classes(root: Path, folders: dict[str, list[Path]]) -> tuple[str, ...]:
    """The classes that every domain has. ValueError where one lacks a class that another has."""
    by_domain = {name: [folder.name for folder in classes] for name, classes in folders.items()}
    union = sorted({name for names in by_domain.values() for name in names})
    for domain, names in by_domain.items():
        missing = [name for name in union if name not in names]
        if missing:
            has = [other for other in by_domain if missing[0] in by_domain[other]]
            raise ValueError(
                f"data: domain {domain!r} in {root} lacks the classes {_some(missing)}, which {_some(has)} has: "
                f"all domains must have the same ones ({LAYOUT})"
            )
    if len(union) < 2:
        raise ValueError(f"data: at least two classes are needed, {root} has {_some(union)} ({LAYOUT})")
    return tuple(union)


def _files(classes: list[Path]) -> list[Path]:
    """The images of a domain. ValueError for a class without one, and where images are in folders below it."""
    result: list[Path] = []
    for folder in classes:
        files = _pictures(folder)
        if absent := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"data: {folder} holds links that lead nowhere ({_some(absent)}): copy what they meant")
        if nested := _folders(folder):
            raise ValueError(
                f"data: {folder} should hold images, it holds folders ({_some([n.name for n in nested])}): "
                f"{LAYOUT} is expected, so DATA may be one folder too high, or divided into parts"
            )
        if not files:
            raise ValueError(f"data: {folder} holds no image (none of {', '.join(EXTENSIONS)})")
        result += files
    return result


def _pictures(folder: Path) -> list[Path]:
    """The files of a folder that are named as images, links among them; none that is hidden."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS)
    return sorted(file for file in files if not _is_foreign(file) and not file.is_dir())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
