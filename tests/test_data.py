"""Data sets in all their forms, and the loader."""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pmgaft.clip.preprocess import PreprocessSpec, open_image, to_pixels
from pmgaft.clip.text import DEFAULT_TEMPLATES, fill
from pmgaft.data import Batch, ImageSet, loader, open_dataset, parquet, skimage_crops, templates_for
from pmgaft.data.image_set import StoredImages
from pmgaft.errors import DataError, InputError

SPEC = PreprocessSpec(size=(24, 24), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
NAMES = ("red disc", "green square", "blue stripes")


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def flat(level: int) -> bytes:
    """A picture whose pixels say which picture it is."""
    return encoded(Image.new("RGB", (24, 24), (level, level, level)))


def in_memory(images: int = 10) -> StoredImages:
    return StoredImages(
        name="levels",
        class_names=("even", "odd"),
        templates=DEFAULT_TEMPLATES,
        labels=[index % 2 for index in range(images)],
        encoded=lambda index: flat(20 * index),
        fingerprint=lambda: "",
    )


def contents(dataset: ImageSet) -> list[tuple[bytes, int]]:
    return [dataset.read(index) for index in range(len(dataset))]


def take(count: int, dataset: ImageSet, **options: Any) -> list[Batch]:
    return list(itertools.islice(loader(dataset, SPEC, **options), count))


def refused(where: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(str(where), **options)
    assert "\n" not in caught.value.message


# --- parquet


def test_a_parquet_folder_has_its_splits(shards: Path) -> None:
    train, test = open_dataset(str(shards), "train"), open_dataset(str(shards), "test")
    assert (len(train), len(test)) == (48, 12)
    assert train.class_names == test.class_names == NAMES
    assert [label for _, label in contents(test)] == [0, 1, 2] * 4
    assert train.hash != test.hash


def test_the_rows_come_in_the_files_order(shards: Path) -> None:
    first, second = (pq.read_table(shards / f"train-0{n}.parquet")["image"].to_pylist() for n in (0, 1))
    assert [image for image, _ in contents(open_dataset(str(shards), "train"))] == first + second


def test_a_single_parquet_file_is_taken_whatever_the_split(shards: Path) -> None:
    for split in ("train", "test"):
        assert len(open_dataset(str(shards / "test.parquet"), split)) == 12


def test_val_serves_as_test(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "set" / "test.parquet").rename(tmp_path / "set" / "val.parquet")
    assert len(open_dataset(str(tmp_path / "set"), "test")) == 12


def test_a_split_that_is_not_there_is_not_replaced_by_another(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "set" / "test.parquet").unlink()
    refused(tmp_path / "set", "no test split; it has train-00.parquet")


def _write(path: Path, images: list[Any], labels: list[Any]) -> None:
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int16())}), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train-01.parquet").write_bytes(b"PAR1 nonsense PAR1"), r"train-01\.parquet is damaged"),
        (
            lambda d: (d / "train-01.parquet").write_bytes((d / "train-01.parquet").read_bytes()[:-50]),
            r"train-01\.parquet",
        ),
        (
            lambda d: pq.write_table(pa.table({"x": [1]}), d / "train-01.parquet"),
            r"train-01\.parquet is damaged or not",
        ),
        (lambda d: _write(d / "train-01.parquet", [b"x", None], [0, 1]), "without image or label"),
        (lambda d: _write(d / "train-01.parquet", [b"x"], [3]), "labels 0 to 3, but 3 class names"),
        (lambda d: _write(d / "train-01.parquet", [b"x"], [-1]), "labels -1 to 2"),
        (lambda d: (d / "classes.json").unlink(), r"no classes\.json, so its classes have no names"),
        (lambda d: (d / "classes.json").write_text("["), "cannot be read"),
        (lambda d: (d / "classes.json").write_text("[]"), "must be a list"),
        (lambda d: (d / "classes.json").write_text('{"a": 1}'), "must be a list"),
        (lambda d: (d / "classes.json").write_text('[{"index": 1, "name": "a"}]'), "must be a list"),
        (lambda d: (d / "classes.json").write_text('["a", " ", "c"]'), "must be a list"),
        (lambda d: (d / "templates.json").write_text('"a {}"'), "must be a list of templates"),
    ],
)
def test_a_damaged_set_is_refused_by_name(
    shards: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(shards, tmp_path / "set")
    damage(tmp_path / "set")
    refused(tmp_path / "set", message, split="train")


def test_an_empty_set_is_refused(shards: Path, tmp_path: Path) -> None:
    shutil.copy(shards / "classes.json", tmp_path)
    _write(tmp_path / "test.parquet", [], [])
    refused(tmp_path, "has no images")


def test_the_hash_depends_on_images_labels_and_class_names(shards: Path, tmp_path: Path) -> None:
    hashes = {open_dataset(str(shards), "test").hash}
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    assert open_dataset(str(folder), "test").hash in hashes
    (folder / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    hashes.add(open_dataset(str(folder), "test").hash)
    images = pq.read_table(folder / "test.parquet")["image"].to_pylist()
    _write(folder / "test.parquet", images, [0] * len(images))
    hashes.add(open_dataset(str(folder), "test").hash)
    _write(folder / "test.parquet", images[::-1], [0] * len(images))
    hashes.add(open_dataset(str(folder), "test").hash)
    assert len(hashes) == 4


@pytest.fixture
def read_columns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every column of a row group that is read: its name, and the group's first row."""
    read: list[tuple[str, int]] = []
    column = parquet._column

    def noted(group: Any, name: str) -> pa.ChunkedArray:
        read.append((name, group.first))
        return column(group, name)

    monkeypatch.setattr(parquet, "_column", noted)
    return read


@pytest.fixture
def in_groups(shards: Path, tmp_path: Path) -> Path:
    """The 48 training images in 24 row groups."""
    tables = [pq.read_table(shards / f"train-0{n}.parquet") for n in (0, 1)]
    pq.write_table(pa.concat_tables(tables), tmp_path / "train.parquet", row_group_size=2)
    shutil.copy(shards / "classes.json", tmp_path)
    return tmp_path


def test_row_groups_change_nothing(shards: Path, in_groups: Path) -> None:
    assert contents(open_dataset(str(in_groups), "train")) == contents(open_dataset(str(shards), "train"))


def test_a_small_set_is_read_when_it_is_opened(in_groups: Path, read_columns: list[tuple[str, int]]) -> None:
    dataset = open_dataset(str(in_groups), "train")
    read_columns.clear()
    contents(dataset)
    assert read_columns == []


def test_a_large_set_is_read_group_by_group_and_a_few_are_kept(
    in_groups: Path, read_columns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(open_dataset(str(in_groups), "train"))
    monkeypatch.setattr(parquet, "IN_MEMORY_UP_TO", 0)
    read_columns.clear()
    dataset = open_dataset(str(in_groups), "train")
    assert {name for name, _ in read_columns} == {"label"}
    read_columns.clear()
    assert contents(dataset) == whole
    assert read_columns == [("image", first) for first in range(0, 48, 2)]
    dataset.read(47)
    assert len(read_columns) == 24
    dataset.read(0)
    assert read_columns[24:] == [("image", 0)]


def test_hugging_faces_form_of_images_and_class_names_is_read(tmp_path: Path) -> None:
    image = pa.array([{"bytes": flat(7), "path": "7.png"}, {"bytes": flat(9), "path": None}])
    table = pa.table({"image": image, "label": pa.array([1, 0])})
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "test-0.parquet")
    dataset = open_dataset(str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert contents(dataset) == [(flat(7), 1), (flat(9), 0)]
    (tmp_path / "classes.json").write_text(json.dumps(["tom", "spike"]))
    assert open_dataset(str(tmp_path)).class_names == ("tom", "spike")


# --- image folders


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """pets/{train,val}/{cat,guinea_pig}/*.png: two training images and one test image a class."""
    for split, count in (("train", 2), ("val", 1)):
        for level, name in enumerate(("cat", "guinea_pig")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "pets" / split / name / f"{number}.png").write_bytes(flat(100 * level + number))
            (tmp_path / "pets" / split / name / "notes.txt").write_text("no image")
    return tmp_path / "pets"


def test_an_image_folder_has_a_class_per_directory(image_folder: Path) -> None:
    train, test = open_dataset(str(image_folder), "train"), open_dataset(str(image_folder), "test")
    assert train.name == test.name == "pets"
    assert train.class_names == ("cat", "guinea pig")
    assert contents(train) == [(flat(0), 0), (flat(1), 0), (flat(100), 1), (flat(101), 1)]
    assert contents(test) == [(flat(0), 0), (flat(100), 1)]
    assert train.hash != test.hash


def test_an_image_folder_without_splits_is_taken_whole(image_folder: Path) -> None:
    assert len(open_dataset(str(image_folder / "train"), "test")) == 4


def test_classes_json_gives_directories_their_names_and_labels(image_folder: Path) -> None:
    classes = [
        {"index": 0, "name": "rodent", "wnid": "guinea_pig"},
        {"index": 1, "name": "dog"},
        {"index": 2, "name": "cat"},
    ]
    (image_folder / "classes.json").write_text(json.dumps(classes))
    dataset = open_dataset(str(image_folder), "test")
    assert dataset.class_names == ("rodent", "dog", "cat")
    assert contents(dataset) == [(flat(0), 2), (flat(100), 0)]
    (image_folder / "val" / "unicorn").mkdir()
    (image_folder / "val" / "unicorn" / "0.png").write_bytes(flat(0))
    refused(image_folder, "does not know the class directory unicorn")


def test_a_class_without_images_is_named(image_folder: Path) -> None:
    (image_folder / "val" / "unicorn").mkdir()
    refused(image_folder, "unicorn holds no images")


def test_an_image_that_vanishes_is_named(image_folder: Path) -> None:
    dataset = open_dataset(str(image_folder), "test")
    (image_folder / "val" / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match=r"cat.0\.png cannot be read"):
        dataset.read(0)


# --- webdataset shards


def write_tar(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _cut_last_member(path: Path) -> None:
    write_tar(path, {"7.cls": b"1", "7.png": b"x" * 5000})
    path.write_bytes(path.read_bytes()[:4000])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two shards of three samples each, in different spellings, with classes.json."""
    write_tar(
        tmp_path / "shards-000.tar",
        {
            f"{n}.{kind}": flat(n) if kind == "png" else f"{n % 3}\n".encode()
            for n in range(3)
            for kind in ("cls", "png")
        },
    )
    write_tar(
        tmp_path / "shards-001.tar",
        {
            f"a/b/{n}.{kind}": flat(n) if kind == "PNG" else str(n % 3).encode()
            for n in range(3, 6)
            for kind in ("PNG", "cls")
        }
        | {"a/b/3.json": b"{}"},
    )
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    return tmp_path


@pytest.mark.parametrize("where", ["shards-{000..001}.tar", ""])
def test_webdataset_shards_are_read_in_order(tars: Path, where: str) -> None:
    dataset = open_dataset(str(tars / where))
    assert dataset.class_names == NAMES
    assert contents(dataset) == [(flat(n), n % 3) for n in range(6)]


def test_one_shard_is_a_set_too(tars: Path) -> None:
    assert len(open_dataset(str(tars / "shards-001.tar"))) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "shards-001.tar").unlink(), r"no file .*shards-001\.tar"),
        (lambda d: (d / "shards-001.tar").write_bytes(b"x" * 600), r"shards-001\.tar is not a readable tar"),
        (
            lambda d: _cut_last_member(d / "shards-001.tar"),
            r"shards-001\.tar is not a readable tar file: unexpected end",
        ),
        (lambda d: write_tar(d / "shards-001.tar", {"7.png": flat(7)}), r"sample 7 has no label \(\.cls, or"),
        (lambda d: write_tar(d / "shards-001.tar", {"7.cls": b"1"}), "sample 7 has no image"),
        (lambda d: write_tar(d / "shards-001.tar", {"7.png": flat(7), "7.cls": b"cat"}), r"7\.cls holds 'cat'"),
        (
            lambda d: (d / "shards-001.tar").write_bytes((d / "shards-001.tar").read_bytes()[:600]),
            "ends early|not a readable",
        ),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tars: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(tars)
    refused(tars / "shards-{000..001}.tar", message)


# --- by name


def test_a_name_is_looked_up_below_the_data_root(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shards, tmp_path / "one" / "direct")
    shutil.copytree(shards, tmp_path / "two" / "zeroshot" / "cifar10")
    assert open_dataset("cifar10", data_root=tmp_path / "two").name == "cifar10"
    monkeypatch.setenv("PMGAFT_DATA", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    assert len(open_dataset("direct")) == len(open_dataset("cifar10")) == 12
    refused("cifar01", "did you mean cifar10")


def test_a_name_without_a_data_root_is_said_so() -> None:
    refused("cifar10", "no such file or folder, and PMGAFT_DATA is not set")


def test_what_is_no_data_set_is_said_so(tmp_path: Path) -> None:
    refused(tmp_path, "holds no data set")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "neither a .parquet file nor an uncompressed .tar")


def test_torchvisions_refusals_are_one_line(tmp_path: Path) -> None:
    refused(f"torchvision:CIFAR10?root={tmp_path}", f"not ready in {tmp_path} .*; add .?root={tmp_path}&download=1")
    refused("torchvision:CIFER10", "did you mean CIFAR10")
    refused("torchvision:CIFAR10?rot=x", "unknown option rot")


def test_the_skimage_set_is_a_thousand_seeded_crops_of_pictures_that_ship() -> None:
    dataset = open_dataset("skimage", "train")
    assert 900 <= len(dataset) <= 1100
    assert len(dataset.class_names) == 12
    assert dataset.read(17) == open_dataset("skimage", "train").read(17)
    assert dataset.read(17) != open_dataset("skimage", "test").read(17)
    image = open_image(dataset.read(8)[0])
    assert dataset.class_names[dataset.read(8)[1]] == "motorcycle"
    assert image.width == image.height <= 224


def test_the_pictures_that_tests_use_are_not_trained_on() -> None:
    used = {Path(name).stem for name in skimage_crops._PHOTOGRAPHS}
    assert used.isdisjoint({"astronaut", "camera", "chelsea", "coffee", "rocket"})


def test_without_scikit_image_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused("skimage", r"pip install \"pmgaft\[demo\]\"")


# --- templates


def test_known_sets_have_their_templates_whatever_their_spelling() -> None:
    assert templates_for("flowers102") == ("a photo of a {}, a type of flower.",)
    assert templates_for("FGVC_Aircraft") == templates_for("fgvcaircraft") == ("a photo of a {}, a type of aircraft.",)
    assert templates_for("never heard of") == DEFAULT_TEMPLATES


def test_every_shipped_template_can_be_filled() -> None:
    from pmgaft.data.prompts import _known_templates

    for templates in (t for sets in _known_templates().values() for t in sets.values()):
        assert templates
        for template in templates:
            fill(template, "cat")


def test_a_set_may_bring_its_own_templates(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "set" / "templates.json").write_text('["a drawing of a {}"]')
    assert open_dataset(str(tmp_path / "set")).templates == ("a drawing of a {}",)


# --- the loader


def test_a_pass_without_shuffling_is_the_set_in_order_ready_for_the_model(shards: Path) -> None:
    dataset = open_dataset(str(shards))
    batches = take(3, dataset, batch_size=5)
    assert [len(batch.labels) for batch in batches] == [5, 5, 2]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(12))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2] * 4
    expected = torch.stack([to_pixels(open_image(image), SPEC) for image, _ in contents(dataset)])
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
    assert [(batch.epoch, batch.step) for batch in batches] == [(0, 0), (0, 1), (0, 2)]


def test_labels_stay_with_their_images_when_shuffled() -> None:
    for batch in take(6, in_memory(), batch_size=4, shuffle=True, seed=3):
        assert (batch.pixels[:, 0, 0, 0] * 255).round().int().tolist() == (20 * batch.indices).tolist()
        assert batch.labels.tolist() == (batch.indices % 2).tolist()


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own() -> None:
    batches = take(9, in_memory(), batch_size=4, shuffle=True, seed=3)
    epochs = [torch.cat([b.indices for b in batches if b.epoch == epoch]).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) and (a.epoch, a.step) == (b.epoch, b.step)
        for a, b in zip(one, other, strict=True)
    )


OPTIONS = {"batch_size": 5, "shuffle": True, "augment": "crop-flip-blur"}


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(shards: Path) -> None:
    dataset = open_dataset(str(shards))
    assert same(take(4, dataset, seed=1, **OPTIONS), take(4, dataset, seed=1, **OPTIONS))
    assert not same(take(4, dataset, seed=1, **OPTIONS), take(4, dataset, seed=2, **OPTIONS))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_pixel(shards: Path, workers: int) -> None:
    dataset = open_dataset(str(shards))
    assert same(take(5, dataset, seed=1, workers=workers, **OPTIONS), take(5, dataset, seed=1, **OPTIONS))


@pytest.mark.parametrize("start", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_stopped_goes_on_with_the_same_batches(shards: Path, start: int, workers: int) -> None:
    dataset = open_dataset(str(shards))
    whole = take(7, dataset, seed=1, **OPTIONS)
    assert same(take(7 - start, dataset, seed=1, start_step=start, workers=workers, **OPTIONS), whole[start:])


@pytest.mark.parametrize("augment", ["crop-flip", "crop-flip-blur"])
def test_augmented_images_differ_between_epochs_and_stay_pixels(shards: Path, augment: str) -> None:
    dataset = open_dataset(str(shards))
    first, second = take(2, dataset, batch_size=12, seed=1, augment=augment)
    assert first.pixels.shape == (12, 3, 24, 24)
    assert first.pixels.min() >= 0
    assert first.pixels.max() <= 1
    assert not any(torch.equal(a, b) for a, b in zip(first.pixels, second.pixels, strict=True))


def test_crops_are_mirrored_every_other_time() -> None:
    ramp = encoded(Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))).convert("RGB"))
    dataset = StoredImages(
        name="ramp", class_names=("a",), templates=("{}",), labels=[0] * 100, encoded=lambda _: ramp, fingerprint=str
    )
    (batch,) = take(1, dataset, batch_size=100, augment="crop-flip")
    mirrored = (batch.pixels[:, 0, 12, 0] > batch.pixels[:, 0, 12, -1]).sum()
    assert 30 <= mirrored <= 70


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_with_its_set(workers: int) -> None:
    dataset = StoredImages(
        name="mixed",
        class_names=("a",),
        templates=("{}",),
        labels=[0] * 4,
        encoded=lambda index: b"junk" if index == 2 else flat(9),
        fingerprint=str,
    )
    with pytest.raises(DataError, match="image 2 of mixed: this is not an image") as caught:
        take(1, dataset, batch_size=4, workers=workers)
    assert caught.tb is not None  # it holds the loader's frame, which may not keep the workers
    assert not multiprocessing.active_children()


def test_a_loader_that_is_left_early_ends_its_processes_and_reads_no_further() -> None:
    read = multiprocessing.Value("i", 0)

    def encoded(_: int) -> bytes:
        with read.get_lock():
            read.value += 1
        return flat(0)

    dataset = StoredImages(
        name="long", class_names=("a",), templates=("{}",), labels=[0] * 500, encoded=encoded, fingerprint=str
    )
    batches = loader(dataset, SPEC, batch_size=5, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
    assert read.value <= 5 * (1 + 2 * 2 + 2)  # the batch taken, two ahead for each worker, and those begun since


def test_images_are_decoded_in_other_processes() -> None:
    own = os.getpid()
    dataset = StoredImages(
        name="who",
        class_names=("a",),
        templates=("{}",),
        labels=[0] * 8,
        encoded=lambda _: flat(255 if os.getpid() == own else 0),
        fingerprint=str,
    )
    assert [int(take(1, dataset, batch_size=8, workers=workers)[0].images.max()) for workers in (0, 1)] == [255, 0]


def test_images_travel_as_bytes_and_become_pixels_as_everywhere_else(shards: Path) -> None:
    dataset = open_dataset(str(shards))
    (batch,) = take(1, dataset, batch_size=4)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.pixels[1], to_pixels(open_image(dataset.read(1)[0]), SPEC))
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(replace(batch, images=every).pixels, every / 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_random_state_alone(workers: int) -> None:
    before = torch.get_rng_state()
    take(2, in_memory(), batch_size=4, shuffle=True, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_every_batch_and_each_has_as_many_rows(shards: Path, ranks: int) -> None:
    dataset = open_dataset(str(shards))
    whole = take(6, dataset, seed=1, **OPTIONS)
    parts = [take(6, dataset, seed=1, rank=rank, ranks=ranks, **OPTIONS) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share.images[: share.counted] for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.indices[: share.counted] for share in shares]), batch.indices)
        assert {(len(share.labels), share.whole) for share in shares} == {
            (math.ceil(len(batch.labels) / ranks), len(batch.labels))
        }
        assert all(share.indices[0] == batch.indices[share.first if share.counted else 0] for share in shares)


def test_workers_where_a_system_cannot_fork_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(InputError, match="use workers = 0"):
        take(1, in_memory(), batch_size=4, workers=2)
