"""Shards as the webdataset library writes and reads them, and folders of them as CLIP-benchmark lays them out."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.data import ImageSet, loader, open_dataset
from pmgaft.errors import DataError
from tests.conftest import CLASS_NAMES, draw, encoded

SPEC = PreprocessSpec(size=(24, 24), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ENCODINGS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def sample(index: int, **more: Any) -> dict[str, Any]:
    """A sample of webdataset's, its image in one of the four encodings."""
    kind = list(ENCODINGS)[index % 4]
    content = {
        "__key__": f"part{index % 2}/{index // 2:06d}",
        kind: encoded(draw(index), ENCODINGS[kind]),
        "cls": index % 3,
    }
    return content | more


def write(folder: Path, pattern: str, samples: list[dict[str, Any]], each: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=each, verbose=0) as writer:
        for content in samples:
            writer.write(content)


def contents(dataset: ImageSet) -> list[tuple[bytes, int]]:
    return [dataset.read(index) for index in range(len(dataset))]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """25 samples in three shards, with what else a sample may have."""
    more = {"txt": "a caption", "json": {"label": 9}, "seg.png": b"a mask", "__url__": "left out by the writer"}
    write(tmp_path, "train-%02d.tar", [sample(index, **more) for index in range(25)], each=10)
    (tmp_path / "classes.json").write_text(json.dumps(CLASS_NAMES))
    return tmp_path


# webdataset leaves the closing of its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_webdataset_wrote_is_read_as_webdataset_reads_it(shards: Path) -> None:
    where = str(shards / "train-{00..02}.tar")
    theirs = webdataset.WebDataset(where, shardshuffle=False, empty_check=False)
    expected = [
        (next(content[kind] for kind in ENCODINGS if kind in content), int(content["cls"])) for content in theirs
    ]
    assert len(expected) == 25
    assert contents(open_dataset(where)) == contents(open_dataset(str(shards), "train")) == expected


@pytest.mark.parametrize("where", ["train-{00,01,02}.tar", "train-0{0..2}.tar", "{train,train}-02.tar"])
def test_braces_may_hold_ranges_and_lists(where: str, shards: Path) -> None:
    assert len(open_dataset(str(shards / where))) == (10 if where.startswith("{") else 25)


def test_ranks_and_workers_share_out_the_images_of_all_shards(shards: Path) -> None:
    dataset = open_dataset(str(shards), "train")
    seen: list[int] = []
    for rank in range(2):
        batches = loader(dataset, SPEC, batch_size=10, shuffle=True, workers=2, rank=rank, ranks=2)
        for batch in itertools.islice(batches, 3):
            seen += batch.indices[: batch.counted].tolist()
    assert sorted(seen) == list(range(25))


def test_a_label_may_stand_in_the_json_alone(tmp_path: Path) -> None:
    image = encoded(draw(0))
    write(tmp_path, "%d.tar", [{"__key__": "a", "png": image, "json": {"label": 2, "width": 40}}], each=9)
    (tmp_path / "classnames.txt").write_text("\n".join(CLASS_NAMES))
    assert contents(open_dataset(str(tmp_path))) == [(image, 2)]


@pytest.mark.parametrize("facts", [{"width": 40}, {"label": "cat"}, {"label": True}, [2]])
def test_a_json_without_a_class_number_is_no_label(facts: Any, tmp_path: Path) -> None:
    write(tmp_path, "%d.tar", [{"__key__": "a", "png": encoded(draw(0)), "json": facts}], each=9)
    (tmp_path / "classnames.txt").write_text("\n".join(CLASS_NAMES))
    with pytest.raises(DataError, match="sample a has no label"):
        open_dataset(str(tmp_path))


def test_a_sample_with_two_images_is_refused(tmp_path: Path) -> None:
    image = encoded(draw(0))
    write(tmp_path, "%d.tar", [{"__key__": "a", "png": image, "webp": image, "cls": 0}], each=9)
    with pytest.raises(DataError, match="sample a has two images"):
        open_dataset(str(tmp_path / "0.tar"))


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """wds_pets as CLIP-benchmark stores it: test/0.tar to test/10.tar of one sample each, and train/0.tar."""
    folder = tmp_path / "wds_pets"
    write(folder / "test", "%d.tar", [sample(index) for index in range(11)], each=1)
    write(folder / "train", "%d.tar", [sample(index) for index in range(11, 15)], each=9)
    (folder / "classnames.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}, a pet.\na {c}.\n")
    return folder


def test_clip_benchmarks_folders_are_read_with_their_classes_and_splits(benchmark: Path) -> None:
    test, train = open_dataset(str(benchmark), "test"), open_dataset(str(benchmark), "train")
    assert test.class_names == train.class_names == CLASS_NAMES
    assert [label for _, label in contents(test)] == [index % 3 for index in range(11)]  # 10.tar is the last
    assert Image.open(io.BytesIO(test.read(10)[0])).size == draw(10).size
    assert (len(train), test.name) == (4, "wds_pets")


def test_clip_benchmarks_templates_are_read_where_its_prompts_are_chosen(benchmark: Path) -> None:
    assert open_dataset(str(benchmark), prompts="clip").templates == ("a photo of a {}, a pet.", "a {}.")
    assert open_dataset(str(benchmark)).templates == ("a photo of a {}.",)
