"""Image trees: DomainBed's order and labels, and refusal of every tree that would spoil an experiment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import picture_tree
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is of the extra [vision]")

from dynmoe_tutel.experiments.vision.domains import LeaveOut
from dynmoe_tutel.experiments.vision.image_folders import ImageFolders


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_tree.write_tree(tmp_path_factory.mktemp("pictures") / "PACS")


@pytest.fixture
def tree(written: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "PACS"))


def test_domains_classes_and_files_are_in_sorted_order(tree: Path) -> None:
    (tree / "README.txt").write_text("a stray file")
    (tree / "art" / "dog" / "notes.txt").write_text("another")
    (tree / ".cache").mkdir()
    data = ImageFolders(tree, 16)
    assert data.domains == picture_tree.DOMAINS
    assert data.classes == picture_tree.CLASSES
    for domain in data.domains:
        names = [file.relative_to(tree / domain).as_posix() for file in data.files[domain]]
        assert names == sorted(names)
        assert len(names) == 3 * picture_tree.PER_CLASS
        assert data.labels(domain).tolist() == [picture_tree.CLASSES.index(name.split("/")[0]) for name in names]


def test_images_are_those_of_their_file(tree: Path) -> None:
    data = ImageFolders(tree, 16)
    for position, domain in enumerate(data.domains):
        index = torch.tensor([5, 0, 11])
        images = data.images(domain, index)
        assert images.shape == (3, 3, 16, 16)
        assert torch.equal(images[:, :, :6].mean((2, 3)).argmax(1), data.labels(domain)[index])
        assert images[:, :, 10:].mean((2, 3)).argmax(1).tolist() == [position] * 3


def test_training_images_are_a_function_of_their_stream(tree: Path) -> None:
    data = ImageFolders(tree, 16)
    index = torch.tensor([3, 3, 3])
    views = data.training_images("photo", index, [7, 8, 7])
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])


def test_the_fingerprint_is_of_the_names(tree: Path) -> None:
    before = ImageFolders(tree, 16).fingerprint
    shutil.copy(tree / "art" / "dog" / "pic_002.jpg", tree / "art" / "dog" / "pic_001.jpg")
    assert ImageFolders(tree, 32).fingerprint == before
    (tree / "art" / "dog" / "pic_001.jpg").unlink()
    assert ImageFolders(tree, 16).fingerprint != before


def test_what_other_systems_leave_is_passed_over_and_said_once(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = ImageFolders(tree, 16)
    assert not caplog.records
    for folder in (tree, tree / "art", tree / "art" / "dog"):
        for name in ("__MACOSX", "@eaDir", ".Trashes"):
            (folder / name / "dog").mkdir(parents=True)
            (folder / name / "dog" / "0.png").write_bytes(b"a thumbnail")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"")
    for name in ("._pic_000.png", "._pic_001.JPG", ".hidden.png"):
        (tree / "art" / "dog" / name).write_bytes(b"\0\5\x16\7")
    data = ImageFolders(tree, 16)
    assert (data.domains, data.classes, data.files) == (before.domains, before.classes, before.files)
    assert data.fingerprint == before.fingerprint
    data.check_headers()
    (record,) = caplog.records
    assert "passed over what is hidden or of another system" in record.getMessage()
    assert "__MACOSX" in record.getMessage()


def test_an_image_whose_name_is_foreign_to_folders_alone_is_read(tree: Path) -> None:
    shutil.copy(tree / "art" / "dog" / "pic_001.jpg", tree / "art" / "dog" / "@eaDir.jpg")
    assert len(ImageFolders(tree, 16).files["art"]) == 3 * picture_tree.PER_CLASS + 1


def test_a_missing_class_is_named_with_the_domain(tree: Path) -> None:
    shutil.rmtree(tree / "sketch" / "giraffe")
    with pytest.raises(ValueError, match=r"'sketch' .* lacks the classes giraffe, which art, photo has"):
        ImageFolders(tree, 16)


def test_a_class_without_images_is_named(tree: Path) -> None:
    shutil.rmtree(tree / "photo" / "dog")
    (tree / "photo" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"photo/dog holds no image \(none of \.jpg"):
        ImageFolders(tree, 16)


def test_a_folder_above_the_data_is_refused(tree: Path) -> None:
    shutil.copytree(tree, tree.parent / "VLCS")
    with pytest.raises(ValueError, match=r"lacks|one folder too high"):
        ImageFolders(tree.parent, 16)
    shutil.rmtree(tree.parent / "VLCS")
    with pytest.raises(ValueError, match=r"at least two domains .* got PACS"):
        ImageFolders(tree.parent, 16)


def test_domains_divided_into_parts_are_refused(tmp_path: Path) -> None:
    """VLCS as some archives have it: DATA/<domain>/<train or test>/<class>/<image>."""
    for domain in ("CALTECH", "SUN"):
        for part in ("test", "train"):
            shutil.copytree(picture_tree.write_tree(tmp_path / domain / part / "x") / "art", tmp_path / "tmp")
            shutil.rmtree(tmp_path / domain / part)
            shutil.move(tmp_path / "tmp", tmp_path / domain / part)
    with pytest.raises(ValueError, match=r"test should hold images, it holds folders \(dog, elephant, giraffe\)"):
        ImageFolders(tmp_path, 16)


def test_one_class_is_refused(tree: Path) -> None:
    for domain in picture_tree.DOMAINS:
        for name in picture_tree.CLASSES[1:]:
            shutil.rmtree(tree / domain / name)
    with pytest.raises(ValueError, match="at least two classes"):
        ImageFolders(tree, 16)


def test_a_domain_without_classes_is_not_left_out_without_a_word(tree: Path) -> None:
    (tree / "cartoon").mkdir()
    assert ImageFolders(tree, 16).domains == ("art", "photo", "sketch")  # archives leave empty folders
    shutil.copy(tree / "art" / "dog" / "pic_001.jpg", tree / "cartoon")
    with pytest.raises(ValueError, match="PACS has images without classes in cartoon: DATA/<domain>"):
        ImageFolders(tree, 16)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; expected is DATA/<domain>/<class>/<image>"):
        ImageFolders(tmp_path / "nowhere", 16)


def test_broken_images_are_named_before_and_during_training(tree: Path) -> None:
    truncated = tree / "art" / "dog" / "pic_001.jpg"
    content = truncated.read_bytes()
    truncated.write_bytes(content[:-20])
    data = ImageFolders(tree, 16)
    data.check_headers()  # a truncated file has a whole header
    with pytest.raises(ValueError, match=r"dog/pic_001\.jpg cannot be read as an image .*truncated"):
        data.images("art", torch.tensor([data.files["art"].index(truncated)]))
    (tree / "photo" / "dog" / "pic_002.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"photo/dog/pic_002\.jpg cannot be read as an image"):
        data.check_headers()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_from_a_worker_too(tree: Path, workers: int) -> None:
    for file in (tree / "art").rglob("*.jpg"):
        file.write_bytes(file.read_bytes()[:-20])
    split = LeaveOut(ImageFolders(tree, 16), ["art"], 0, 2)
    with pytest.raises(ValueError, match=r"^data: .*\.jpg cannot be read as an image .*anew$") as error:
        list(split.evaluated("art", workers))
    assert "\n" not in str(error.value)


def test_links_that_lead_nowhere_are_named(tree: Path) -> None:
    """Otherwise they would be silently skipped, and the splits would differ."""
    (tree / "art" / "dog" / "pic_009.jpg").symlink_to(tree / "gone.jpg")
    with pytest.raises(ValueError, match=r"art/dog holds links that lead nowhere \(pic_009\.jpg\)"):
        ImageFolders(tree, 16)


def test_too_few_images_of_a_domain(tree: Path) -> None:
    for name in picture_tree.CLASSES:
        for file in sorted((tree / "photo" / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(ValueError, match="domain 'photo' has 3 images, at least 5"):
        LeaveOut(ImageFolders(tree, 16), ["art"], 0, 2)


def test_without_pillow_the_extra_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"dynmoe_tutel\[vision\]"):
        ImageFolders(tree, 16)
