"""The sets that the field evaluates on: made-up pictures in torchvision's layouts, read by torchvision itself."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from click.testing import CliRunner
from PIL import Image

from pmgaft.cli import main
from pmgaft.clip.preprocess import open_image
from pmgaft.data import ImageSet, Prompts, open_dataset
from pmgaft.data.torchvision_sets import KNOWN
from pmgaft.errors import DataError
from tests.conftest import draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a made-up set must be read as. options: how torchvision is asked for the part that is evaluated."""

    labels: list[int]
    plain: tuple[str, ...]
    paper: tuple[str, ...]
    options: dict[str, Any]


def picture(path: Path, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(index).save(path, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")


def cifar10(root: Path) -> Facts:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 1, 0, 9]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return Facts(labels=[3, 1, 0, 9], plain=tuple(names), paper=tuple(names), options={"train": False})


def cifar100(root: Path) -> Facts:
    folder = root / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [1, 0]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["aquarium_fish", "willow_tree"]}))
    names = ("aquarium fish", "willow tree")
    return Facts(labels=[1, 0], plain=names, paper=names, options={"train": False})


def stl10(root: Path) -> Facts:
    folder = root / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3 * 96 * 96), dtype=np.uint8)
    for part in ("train", "test"):
        pixels.tofile(folder / f"{part}_X.bin")
        np.array([2, 1], dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    return Facts(labels=[1, 0], plain=("airplane", "bird"), paper=("airplane", "bird"), options={"split": "test"})


def sun397(root: Path) -> Facts:
    folder = root / "SUN397"
    picture(folder / "b" / "ball_pit" / "sun_bb.jpg", 2)
    picture(folder / "a" / "apse" / "indoor" / "sun_ab.jpg", 1)
    picture(folder / "a" / "apse" / "indoor" / "sun_aa.jpg", 0)
    (folder / "ClassName.txt").write_text("/a/apse/indoor\n/b/ball_pit\n")
    names = ("apse indoor", "ball pit")
    return Facts(labels=[0, 0, 1], plain=names, paper=names, options={})


def food101(root: Path) -> Facts:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        entries = {"apple_pie": [f"apple_pie/{split}"], "beet_salad": [f"beet_salad/{split}"]}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(entries))
        for index, name in enumerate(entries):
            picture(folder / "images" / name / f"{split}.jpg", index)
    names = ("apple pie", "beet salad")
    return Facts(labels=[0, 1], plain=names, paper=names, options={"split": "test"})


def pets(root: Path) -> Facts:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split in ("trainval", "test"):
        lines = [f"american_bulldog_{split} 2 2 1", f"Abyssinian_{split} 1 1 1"]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))
        picture(folder / "images" / f"american_bulldog_{split}.jpg", 1)
        picture(folder / "images" / f"Abyssinian_{split}.jpg", 0)
    return Facts(
        labels=[1, 0],
        plain=("Abyssinian", "American Bulldog"),
        paper=("abyssinian", "american bulldog"),
        options={"split": "test"},
    )


def flowers(root: Path) -> Facts:
    folder = root / "flowers-102"
    for number in (1, 2, 3):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", number)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([12, 60, 2])})
    scipy.io.savemat(folder / "setid.mat", {"trnid": np.array([1, 2]), "valid": [1, 3], "tstid": np.array([3, 1])})
    from torchvision.datasets import Flowers102

    names = tuple(Flowers102.classes)
    return Facts(
        labels=[1, 11],
        plain=names,
        paper=tuple(name.replace("-", " ") for name in names),
        options={"split": "test"},
    )


def dtd(root: Path) -> Facts:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        files = [f"polka-dotted/polka-dotted_{split}.jpg", f"banded/banded_{split}.jpg"]
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(files))
        for index, file in enumerate(files):
            picture(folder / "images" / file, index)
    return Facts(
        labels=[1, 0],
        plain=("banded", "polka-dotted"),
        paper=("banded", "polka dotted"),
        options={"split": "test"},
    )


def eurosat(root: Path) -> Facts:
    for index, name in enumerate(("AnnualCrop", "Forest", "SeaLake")):
        picture(root / "eurosat" / "2750" / name / f"{name}_1.jpg", index)
    return Facts(
        labels=[0, 1, 2],
        plain=("annual crop land", "forest", "lake or sea"),
        paper=("annual crop land", "a forest", "a sea or a lake"),
        options={},
    )


def aircraft(root: Path) -> Facts:
    folder = root / "fgvc-aircraft-2013b" / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nA300B4\nF/A-18\n")
    for split in ("train", "val", "trainval", "test"):
        (folder / f"images_variant_{split}.txt").write_text("0002 F/A-18\n0001 707-320\n")
    for number in (1, 2):
        picture(folder / "images" / f"000{number}.jpg", number)
    return Facts(
        labels=[2, 0],
        plain=("707-320", "A300B4", "F A-18"),
        paper=("boeing 707-320", "a300b4", "f/a-18"),
        options={"split": "test"},
    )


def imagenet(root: Path) -> Facts:
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    wnids = {"n02012849": ("crane",), "n02113186": ("Cardigan",), "n03126707": ("crane",)}
    torch.save((wnids, []), root / "meta.bin")
    for index, wnid in enumerate(sorted(wnids)):
        picture(root / "val" / wnid / "ILSVRC2012_val_0.JPEG", index)
        picture(root / "train" / wnid / "0.JPEG", index)
    return Facts(
        labels=[0, 1, 2],
        plain=("crane bird", "Cardigan Welsh Corgi", "construction crane"),
        paper=("crane", "cardigan", "crane"),
        options={"split": "val"},
    )


def caltech101(root: Path) -> Facts:
    for index, name in enumerate(("BACKGROUND_Google", "Faces", "Faces_easy", "accordion", "yin_yang")):
        picture(root / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg", index)
    return Facts(
        labels=[0, 1, 2, 3],
        plain=("off-center face", "centered face", "accordion", "yin and yang symbol"),
        paper=("faces", "faces easy", "accordion", "yin yang"),
        options={},
    )


def caltech256(root: Path) -> Facts:
    for index, name in enumerate(("001.ak47", "002.car-side-101", "003.clutter")):
        picture(root / "caltech256" / "256_ObjectCategories" / name / f"00{index + 1}_0001.jpg", index)
    names = ("ak47", "car side", "clutter")
    return Facts(labels=[0, 1, 2], plain=names, paper=names, options={})


def cars(root: Path) -> Facts:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = ["Bentley Continental GT Coupe 2012", "Bentley Continental GT Coupe 2007", "Ram C/V Cargo Van Minivan 2012"]
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    annotations = np.array([("1.jpg", 3), ("2.jpg", 2)], dtype=[("fname", object), ("class", np.uint8)])
    scipy.io.savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": annotations})
    scipy.io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    for part in ("cars_train", "cars_test"):
        picture(folder / part / "1.jpg", 0)
        picture(folder / part / "2.jpg", 1)
    return Facts(
        labels=[2, 1],
        plain=(*names[:2], "Ram C V Cargo Van Minivan 2012"),
        paper=("bentley continental gt coupe", "bentley continental gt coupe", "ram c v cargo van minivan"),
        options={"split": "test"},
    )


def pcam(root: Path) -> Facts:
    (root / "pcam").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    for split in ("train", "test", "valid"):
        with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{split}_x.h5", "w") as file:
            file["x"] = pixels
        with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{split}_y.h5", "w") as file:
            file["y"] = np.array([1, 0, 1], dtype=np.uint8).reshape(3, 1, 1, 1)
    return Facts(
        labels=[1, 0, 1],
        plain=("lymph node", "lymph node containing metastatic tumor tissue"),
        paper=("healthy lymph node tissue", "lymph node tumor tissue"),
        options={"split": "test"},
    )


def country211(root: Path) -> Facts:
    for split in ("train", "valid", "test"):
        for index, name in enumerate(("AD", "KR")):
            picture(root / "country211" / split / name / "0.jpg", index)
    names = ("Andorra", "South Korea")
    return Facts(labels=[0, 1], plain=names, paper=names, options={"split": "test"})


SETS: dict[str, Callable[[Path], Facts]] = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "Caltech101": caltech101,
    "Caltech256": caltech256,
    "Country211": country211,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "FGVCAircraft": aircraft,
    "Flowers102": flowers,
    "Food101": food101,
    "ImageNet": imagenet,
    "OxfordIIITPet": pets,
    "PCAM": pcam,
    "STL10": stl10,
    "SUN397": sun397,
    "StanfordCars": cars,
}


@pytest.fixture(autouse=True)
def no_check_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up files have others than the true ones."""
    for module in ("cifar", "stl10", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def pixels(dataset: ImageSet) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(open_image(dataset.read(index)[0])) for index in range(len(dataset))]


def read(name: str, root: Path, prompts: Prompts = "plain") -> ImageSet:
    return open_dataset(name, data_root=root, prompts=prompts)


def test_every_set_that_may_be_named_is_tried_here() -> None:
    assert SETS.keys() == KNOWN.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_by_its_plain_name_as_torchvision_reads_it(name: str, tmp_path: Path) -> None:
    from torchvision import datasets

    facts = SETS[name](tmp_path)
    theirs = getattr(datasets, name)(tmp_path, **facts.options)
    ours = read(name.lower(), tmp_path)
    assert [ours.read(index)[1] for index in range(len(ours))] == facts.labels
    expected = [(np.asarray(image.convert("RGB")), label) for image, label in (theirs[i] for i in range(len(theirs)))]
    if name == "SUN397":
        expected.sort(key=lambda pair: pair[1])  # torchvision's order is the file system's
        expected[:2] = sorted(expected[:2], key=lambda pair: pair[0].tobytes())
    found = pixels(ours)
    if name == "SUN397":
        found[:2] = sorted(found[:2], key=lambda image: image.tobytes())
    assert [label for _, label in expected] == facts.labels
    assert all(np.array_equal(a, b) for a, (b, _) in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SETS)
def test_the_classes_are_called_as_the_chosen_prompts_call_them(name: str, tmp_path: Path) -> None:
    facts = SETS[name](tmp_path)
    assert read(name, tmp_path).class_names == read(name, tmp_path, "clip").class_names == facts.plain
    assert read(name, tmp_path, "paper").class_names == facts.paper


@pytest.mark.parametrize(
    ("name", "plain", "paper", "clip"),
    [
        ("CIFAR10", "a photo of a {}.", "This is a photo of a {}", 18),
        ("CIFAR100", "a photo of a {}.", "This is a photo of a {}", 18),
        ("STL10", "a photo of a {}.", "This is a photo of a {}", 2),
        ("SUN397", "a photo of a {}.", "This is a photo of a {}", 2),
        ("Food101", "a photo of {}, a type of food.", "A photo of {}, a type of food.", 1),
        ("OxfordIIITPet", "a photo of a {}, a type of pet.", "A photo of a {}, a type of pet.", 1),
        ("Flowers102", "a photo of a {}, a type of flower.", "A photo of a {}, a type of flower.", 1),
        ("DTD", "a photo of a {} texture.", "A surface with a {} texture.", 8),
        ("EuroSAT", "a centered satellite photo of {}.", "A centered satellite photo of {}.", 3),
        ("FGVCAircraft", "a photo of a {}, a type of aircraft.", "A photo of a {}, a type of aircraft.", 2),
        ("ImageNet", "a photo of a {}.", "This is a photo of a {}", 80),
        ("Caltech101", "a photo of a {}.", "A photo of a {}.", 34),
        ("Caltech256", "a photo of a {}.", "A photo of a {}.", 34),
        ("StanfordCars", "a photo of a {}.", "A photo of a {}.", 8),
        ("PCAM", "this is a photo of {}", "This is a photo of {}.", 2),
    ],
)
def test_each_set_has_the_templates_of_the_chosen_prompts(
    name: str, plain: str, paper: str, clip: int, tmp_path: Path
) -> None:
    SETS[name](tmp_path)
    assert read(name, tmp_path).templates == (plain,)
    assert read(name, tmp_path, "paper").templates == (paper,)
    assert len(read(name, tmp_path, "clip").templates) == clip


def test_pictures_that_are_files_are_not_encoded_anew(tmp_path: Path) -> None:
    pets(tmp_path)
    stored = (tmp_path / "oxford-iiit-pet" / "images" / "american_bulldog_test.jpg").read_bytes()
    assert read("pets", tmp_path).read(0)[0] == stored


def test_the_order_of_sun397_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sun397(tmp_path)
    before = read("SUN397", tmp_path)
    found = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(found(path, pattern))))
    after = read("SUN397", tmp_path)
    assert [before.read(index) for index in range(3)] == [after.read(index) for index in range(3)]
    assert before.hash == after.hash


@pytest.mark.parametrize("name", ["Food101", "CIFAR10", "PCAM", "Caltech101"])
def test_the_hash_follows_the_pictures_and_not_the_place(name: str, tmp_path: Path) -> None:
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        SETS[name](tmp_path / root)
    assert read(name, tmp_path / "one").hash == read(name, tmp_path / "two").hash
    changed = tmp_path / "two"
    if name == "CIFAR10":
        content = {"data": np.zeros((4, 3072), np.uint8), "labels": [3, 1, 0, 9]}
        (changed / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content))
    elif name == "PCAM":
        with h5py.File(changed / "pcam" / "camelyonpatch_level_2_split_test_x.h5", "a") as file:
            file["x"][0] = 0
    else:
        for path in changed.rglob("*.jpg"):
            Image.new("RGB", (40, 40)).save(path)
    assert read(name, tmp_path / "one").hash != read(name, tmp_path / "two").hash


@pytest.mark.parametrize("name", ["EuroSAT", "Caltech101", "Caltech256", "SUN397"])
def test_a_set_without_splits_is_taken_whole(name: str, tmp_path: Path) -> None:
    SETS[name](tmp_path)
    assert open_dataset(name, "train", tmp_path).hash == open_dataset(name, "test", tmp_path).hash


@pytest.mark.parametrize("name", ["Flowers102", "OxfordIIITPet", "CIFAR10", "StanfordCars"])
def test_a_set_with_splits_has_a_training_part(name: str, tmp_path: Path) -> None:
    facts = SETS[name](tmp_path)
    assert len(open_dataset(name, "train", tmp_path)) == (20 if name == "CIFAR10" else len(facts.labels))
    assert open_dataset(name, "train", tmp_path).hash != open_dataset(name, "test", tmp_path).hash


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("oxfordpet", "OxfordIIITPet"), ("fgvc_aircraft", "FGVCAircraft"), ("dtd", "DTD"), ("flowers", "Flowers102")],
)
def test_the_spellings_of_the_papers_code_are_understood(spelling: str, name: str, tmp_path: Path) -> None:
    SETS[name](tmp_path)
    assert read(spelling, tmp_path).class_names == read(name, tmp_path).class_names


def test_the_first_root_that_has_the_set_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
    eurosat(tmp_path / "two")
    monkeypatch.setenv("PMGAFT_DATA", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    assert len(open_dataset("eurosat")) == len(open_dataset("torchvision:EuroSAT")) == 3


def test_looking_for_a_set_that_is_not_there_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no data set 'caltech101' in .* no caltech101/101_ObjectCategories; .*download=1"
    ):
        open_dataset("caltech101", data_root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_known_name_is_read_where_torchvisions_layout_is_not(tmp_path: Path) -> None:
    for index, name in enumerate(("cat", "dog")):
        picture(tmp_path / "cifar10" / name / "0.png", index)
    assert read("CIFAR-10", tmp_path).class_names == ("cat", "dog")


def test_damaged_annotations_are_no_missing_split(tmp_path: Path) -> None:
    aircraft(tmp_path)
    (tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_test.txt").write_text("0001\n")
    with pytest.raises(DataError, match="torchvision's FGVCAircraft is not ready"):
        read("fgvc", tmp_path)


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pcam(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match=r"h5py is not found.*pip install \"pmgaft\[datasets\]\""):
        read("pcam", tmp_path)


def test_a_set_whose_classes_nobody_names_is_refused(tmp_path: Path) -> None:
    stl10(tmp_path)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    with pytest.raises(DataError, match="does not name the classes of STL10"):
        read("stl10", tmp_path)


def test_what_torchvision_cannot_open_by_a_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="torchvision's FakeData is not ready"):
        read("torchvision:FakeData", tmp_path)


def test_an_evaluation_says_which_templates_the_chosen_prompts_were(tmp_path: Path, tiny_vit_clip_dir: Path) -> None:
    dtd(tmp_path)
    words = ["evaluate", str(tiny_vit_clip_dir), "--dataset", "dtd", "--data-root", str(tmp_path), "--prompts", "paper"]
    output = tmp_path / "result.json"
    done = CliRunner().invoke(main, [*words, "--attack", "none", "--workers", "1", "--output", str(output)])
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(output.read_text())["sets"]
    assert entry["templates"] == ["A surface with a {} texture."]


# --- folders by WordNet id


def test_an_imagenet_folder_is_named_by_its_wordnet_ids(tmp_path: Path) -> None:
    for index, wnid in enumerate(("n02012849", "n03126707")):
        picture(tmp_path / "imagenet" / "val" / wnid / f"{wnid}.JPEG", index)
    assert read("imagenet", tmp_path).class_names == ("crane bird", "construction crane")
    paper = read("imagenet", tmp_path, "paper")
    assert (paper.class_names, paper.templates) == (("crane", "crane"), ("This is a photo of a {}",))


def test_a_wordnet_id_that_is_not_imagenets_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "n00000001" / "0.JPEG", 0)
    with pytest.raises(
        DataError, match=r"n00000001 is none of ImageNet's 1,000 classes; name the classes in a classes"
    ):
        read("set", tmp_path)


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Tiny ImageNet as distributed: three classes, of which val has two."""
    folder = tmp_path / "tiny-imagenet-200"
    wnids = ["n02123045", "n01443537", "n03126707"]
    for index, wnid in enumerate(wnids):
        picture(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG", index)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    (folder / "wnids.txt").write_text("\n".join(wnids))
    for index in range(3):
        picture(folder / "val" / "images" / f"val_{index}.JPEG", index)
    rows = [(0, "n03126707"), (2, "n01443537"), (1, "n03126707")]
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62" for number, wnid in rows]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", ["tiny-imagenet-200", "tinyImageNet", "tiny_imagenet"])
def test_tiny_imagenets_val_part_is_read_as_distributed(name: str, tiny_imagenet: Path) -> None:
    val, train = read(name, tiny_imagenet.parent), open_dataset(name, "train", tiny_imagenet.parent)
    assert val.class_names == train.class_names == ("goldfish", "tabby cat", "construction crane")
    assert [val.read(index)[1] for index in range(3)] == [2, 0, 2]
    assert val.read(1)[0] == (tiny_imagenet / "val" / "images" / "val_2.JPEG").read_bytes()
    assert [train.read(index)[1] for index in range(3)] == [0, 1, 2]
    assert read(name, tiny_imagenet.parent, "paper").class_names == ("goldfish", "tabby", "crane")


def test_tiny_imagenets_val_part_sorted_into_classes_is_read_too(tiny_imagenet: Path) -> None:
    images = tiny_imagenet / "val" / "images"
    for wnid, name in (("n03126707", "val_0.JPEG"), ("n01443537", "val_2.JPEG"), ("n02123045", "val_1.JPEG")):
        (tiny_imagenet / "val" / wnid).mkdir()
        (images / name).rename(tiny_imagenet / "val" / wnid / name)
    images.rmdir()
    val = read("tinyimagenet", tiny_imagenet.parent)
    assert [val.read(index)[1] for index in range(3)] == [0, 1, 2]
    assert val.class_names == ("goldfish", "tabby cat", "construction crane")


@pytest.mark.parametrize("line", ["val_9.JPEG\tn01443537\t0", "val_0.JPEG", "val_0.JPEG\tn99999999\t0"])
def test_an_annotation_without_its_image_or_class_is_named(line: str, tiny_imagenet: Path) -> None:
    with (tiny_imagenet / "val" / "val_annotations.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 4, does not name an image and a class that are there"):
        read("tinyimagenet", tiny_imagenet.parent)
