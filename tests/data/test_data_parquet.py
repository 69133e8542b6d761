"""Parquet in the hub's layouts: files and columns are chosen by rule, or refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_files import png, refused, some_pixels, write_parquet
from redefense.data import load_dataset
from redefense.data.check import check_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDEFENSE_CACHE", str(tmp_path / "cache"))


def hub_rows(count: int = 6) -> list[tuple[bytes, int]]:
    return [(png(image), n % 2) for n, image in enumerate(some_pixels(count, 3, 8, 8))]


@pytest.mark.parametrize("file", ["data/{}-00000-of-00001-ab12.parquet", "x/{}/0000.parquet"])
def test_parquet_columns_are_found_by_type(file: str, tmp_path: Path) -> None:
    rows = hub_rows()
    root = write_parquet(tmp_path, rows, rows[:2], ["no", "yes"], image="picture", file=file)
    found = load_dataset(f"parquet:{root}")
    assert found.classes == ("no", "yes")
    assert torch.equal(found.train.images, torch.from_numpy(some_pixels(6, 3, 8, 8)))
    assert found.train.labels.tolist() == [0, 1] * 3
    assert "'picture'" in found.found
    nameless = write_parquet(tmp_path / "nameless", rows, rows, [])
    assert load_dataset(f"parquet:{nameless}").classes == ("0", "1")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    rows = hub_rows()
    write_parquet(tmp_path / "a", [*rows, (b"text", 0)], rows, ["no", "yes"])
    refused(f"parquet:{tmp_path / 'a'}", "train-.* row 6: not an image")
    write_parquet(tmp_path / "b", [*rows, (rows[0][0], 2)], rows, ["no", "yes"])
    refused(f"parquet:{tmp_path / 'b'}", r"train: 1 unknown labels outside \[0, 2\).*2 of image 6")
    root = write_parquet(tmp_path / "c", rows, rows, ["no", "yes"])
    (root / "test-00000-of-00001.parquet").rename(root / "rest.parquet")
    refused(f"parquet:{root}", "no test file among 2 parquet files")
    empty = write_parquet(tmp_path / "d", rows, [], ["no", "yes"])
    refused(f"parquet:{empty}", "test: no images")
    (root / "test-0.parquet").write_bytes(b"PAR1 nothing")
    refused(f"parquet:{root}", "test-0.parquet: not a readable parquet file")
    (root / "test-0.parquet").unlink()
    (root / "test-0.parquet").symlink_to(tmp_path / "a" / "test-00000-of-00001.parquet")
    refused(f"parquet:{root}", "link out of")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "c" / "train-00000-of-00001.parquet")
    (root / "test-0.parquet").unlink()
    (root / "rest.parquet").rename(root / "test-0.parquet")
    refused(f"parquet:{root}", "needs one image column")


def test_links_inside_the_hubs_own_cache_are_followed(tmp_path: Path) -> None:
    rows = hub_rows()
    snapshot = write_parquet(tmp_path / "snapshots" / "rev", rows, rows, ["no", "yes"])
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    assert len(load_dataset(f"parquet:{snapshot}").train) == 6


def test_a_missing_pyarrow_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_parquet(tmp_path, hub_rows(), hub_rows(), ["no", "yes"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(f"parquet:{root}", r"needs pyarrow; .* -e '\.\[parquet\]'")


# configurations


def two_configurations(root: Path) -> Path:
    rows = hub_rows()
    turned = [(raw, 1 - y) for raw, y in rows]
    write_parquet(root / "one", rows, rows, ["a", "b"])
    write_parquet(root / "two", turned, turned, ["a", "b"], file="{}/0000.parquet")
    return root


def test_of_several_configurations_one_is_chosen_by_name(tmp_path: Path) -> None:
    root = two_configurations(tmp_path / "set")
    refused(f"parquet:{root}", r"2 configurations, one, two; choose one, as in .*\?config=one")
    refused(f"parquet:{root}?config=three", "no configuration 'three'; there are one, two")
    labels = {
        name: load_dataset(f"parquet:{root}?config={name}").train.labels for name in ("one", "two")
    }
    assert torch.equal(labels["one"], 1 - labels["two"])
    for name in labels:  # each copy in the cache is of its own options
        again = load_dataset(f"parquet:{root}?config={name}")
        assert torch.equal(again.train.labels, labels[name])
        assert torch.equal(load_dataset(f"parquet:{root / name}").train.labels, labels[name])
        report = check_dataset(f"parquet:{root}?config={name}")
        assert (report.problems, report.notes[-1].endswith("intact")) == ((), True)


def test_files_beside_folders_are_a_configuration_of_their_own(tmp_path: Path) -> None:
    rows = hub_rows()
    write_parquet(tmp_path, rows, rows, ["a", "b"])
    assert len(load_dataset(f"parquet:{tmp_path}").train) == 6
    write_parquet(tmp_path / "data", rows[:4], rows, ["a", "b"])
    refused(f"parquet:{tmp_path}", r"2 configurations, \., data")
    assert len(load_dataset(f"parquet:{tmp_path}?config=.").train) == 6
    assert len(load_dataset(f"parquet:{tmp_path}?config=data").train) == 4
    # a training and a test split of unlike sets are no pair
    other = tmp_path / "other"
    write_parquet(other / "a", rows, rows, ["a", "b"])
    write_parquet(other / "b", rows, rows, ["a", "b"])
    next((other / "a").glob("test*")).unlink()
    next((other / "b").glob("train*")).unlink()
    refused(f"parquet:{other}", "2 configurations, a, b")


@pytest.mark.parametrize("hidden", [".cache/huggingface/download", ".git/lfs", "__MACOSX"])
def test_hidden_tables_are_passed_over(hidden: str, tmp_path: Path) -> None:
    rows = hub_rows()
    write_parquet(tmp_path, rows, rows, ["a", "b"])
    write_parquet(tmp_path / hidden, rows[:2], rows[:2], ["a", "b"])
    (tmp_path / "._train-00000-of-00001.parquet").write_bytes(b"resource fork")
    assert len(load_dataset(f"parquet:{tmp_path}").train) == 6


# parts


def parts(root: Path, names: list[str]) -> Path:
    rows = hub_rows()
    write_parquet(root, rows, rows, ["a", "b"])
    whole = root / "train-00000-of-00001.parquet"
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(whole.read_bytes())
    if whole.name not in names:
        whole.unlink()
    if any("/" in name for name in names):
        (root / "test").mkdir()
        (root / "test-00000-of-00001.parquet").rename(root / "test" / "0000.parquet")
    return root


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet",
         "train-00002-of-00003.parquet"],
        ["train-00000-of-00002-ab12.parquet", "train-00001-of-00002-34cd.parquet"],
        ["train-1-of-2.parquet", "train-2-of-2.parquet"],
        ["train-0.parquet", "train-1.parquet"],
        ["train_1.parquet", "train_2.parquet"],
        ["train-2019.parquet", "train-2021.parquet"],
        ["train/0000.parquet", "train/0001.parquet"],
        ["train.parquet"],
        ["train-clean.parquet"],
    ],
)  # fmt: skip
def test_all_parts_of_a_table_are_read(names: list[str], tmp_path: Path) -> None:
    found = load_dataset(f"parquet:{parts(tmp_path / 'set', names)}")
    assert len(found.train) == 6 * len(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"],
         "train: 1 of 3 parts are missing: train-00001-of-00003.parquet"),
        (["train-00000-of-00003.parquet"],
         "2 of 3 parts are missing: train-00001-of-00003.parquet, train-00002-of-00003.parquet"),
        (["train-00000-of-99999.parquet"], "99998 of 99999 .* and 99995 more"),
        (["train/0001.parquet"], "train: 1 of 2 parts are missing: 0000.parquet"),
        (["train-2-of-3.parquet", "train-3-of-3.parquet"], "1 of 3 .*: train-1-of-3.parquet"),
        (["train-00004-of-00003.parquet"], "train-00004-of-00003.parquet: more than 00003 parts"),
        (["train-00000-of-00001-ab.parquet", "train-00000-of-00001-cd.parquet"],
         "train-00000-of-00001-cd.parquet: this part occurs twice"),
        (["train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"], "occurs twice"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet",
          "train-00001-of-00002.parquet"], "not numbered as parts of one table"),
        (["train.parquet", "train-00000-of-00001.parquet"], "not numbered as parts of one table"),
        (["train-clean.parquet", "train-noisy.parquet"], "not numbered as parts of one table"),
        (["train-0.parquet", "train_small-1.parquet"], "not numbered as parts of one table"),
        (["train-0.parquet", "train-2.parquet"], "1 of 3 parts are missing: train-1.parquet"),
        (["train/0000.parquet", "train/0002.parquet"], "1 of 3 parts are missing: 0001.parquet"),
        (["train/0002.parquet"], "2 of 3 parts are missing: 0000.parquet, 0001.parquet"),
    ],
)  # fmt: skip
def test_missing_and_foreign_parts_are_named(
    names: list[str], message: str, tmp_path: Path
) -> None:
    refused(f"parquet:{parts(tmp_path / 'set', names)}", message)


# columns


def write_columns(
    root: Path, columns: dict[str, list[Any]], features: dict[str, Any], *, masks: bool = False
) -> Path:
    """Six images beside some columns, as train and test."""
    root.mkdir()
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": raw, "path": None} for raw, _ in hub_rows()], struct)
    data = {"image": images, **({"mask": images} if masks else {})}
    table = pa.table(data | {name: pa.array(values) for name, values in columns.items()})
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in ("train", "test"):
        pq.write_table(table.replace_schema_metadata(meta), root / f"{split}.parquet")
    return root


CLASSES = {"names": ["no", "yes"], "_type": "ClassLabel"}
ALTERNATE, ROWS = [0, 1] * 3, list(range(6))


@pytest.mark.parametrize(
    ("columns", "features", "expected"),
    [
        ({"label": ALTERNATE, "id": ROWS}, {}, "label"),
        ({"id": ROWS, "labels": ALTERNATE}, {}, "labels"),
        ({"coarse_label": ROWS, "fine_label": ALTERNATE}, {}, "fine_label"),
        ({"width": ROWS, "species": ALTERNATE}, {"species": CLASSES}, "species"),
        ({"label": ALTERNATE, "species": ROWS}, {"species": CLASSES}, "label"),
        ({"label": ["a", "b"] * 3, "species": ALTERNATE}, {"species": CLASSES}, "species"),
    ],
)
def test_the_label_is_the_column_that_says_so(
    columns: dict[str, list[Any]], features: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    found = load_dataset(f"parquet:{write_columns(tmp_path / 'set', columns, features)}")
    assert f"label column {expected!r}" in found.found
    assert found.train.labels.tolist() == ALTERNATE


@pytest.mark.parametrize(
    ("columns", "features", "found"),
    [
        ({"id": ROWS}, {}, "found id. Name another, as in .*label=COLUMN"),
        ({"width": ROWS, "height": ROWS}, {}, "found width, height"),
        ({"genus": ROWS, "species": ROWS}, {"genus": CLASSES, "species": CLASSES}, "genus, spec"),
        ({"label": ["a", "b"] * 3}, {}, "found no integers"),
        ({"label": [0.0, 1.0] * 3}, {}, "found no integers"),
        ({"label": [True, False] * 3}, {}, "found no integers"),
        ({"label": [0, 1, None] * 2}, {}, "2 images without a label"),
        ({"label": [-1] * 6}, {"label": CLASSES}, r"6 unknown labels outside \[0, 2\)"),
        ({"label": [7, 7, 7, 8, 8, 8]}, {}, "class '0' has no images"),
        ({"label": ALTERNATE}, {"label": {"names": 3}}, "damaged huggingface metadata"),
    ],
)
def test_no_other_column_is_taken_for_a_label(
    columns: dict[str, list[Any]], features: dict[str, Any], found: str, tmp_path: Path
) -> None:
    refused(f"parquet:{write_columns(tmp_path / 'set', columns, features)}", found)


def test_columns_of_other_names_are_chosen(tmp_path: Path) -> None:
    root = write_columns(
        tmp_path / "set", {"id": ROWS, "is cat": ALTERNATE}, {"is cat": CLASSES}, masks=True
    )
    refused(f"parquet:{root}", r"needs one image column .*found 2 among image, mask.*image=COLUMN")
    refused(f"parquet:{root}?image=id", "needs one image column .*found 0 among image")
    chosen = load_dataset(f"parquet:{root}?image=mask&label=is+cat")
    assert chosen.classes == ("no", "yes")
    assert "image column 'mask', label column 'is cat'" in chosen.found
    assert load_dataset(f"parquet:{root}?image=mask&label=id").num_classes == 6
    refused(f"parquet:{root}?image=mask&label=other", "needs a label column")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?label", "options are written"),
        ("?lable=x", "the options are config, label, image"),
        ("?label=x&label=y", "the options are .*, each once"),
    ],
)
def test_unknown_options_are_refused(options: str, message: str, tmp_path: Path) -> None:
    rows = hub_rows()
    root = write_parquet(tmp_path / "set", rows, rows, ["a", "b"])
    refused(f"parquet:{root}{options}", message)


def test_a_folder_may_have_a_question_mark_in_its_name(tmp_path: Path) -> None:
    rows = hub_rows()
    root = write_parquet(tmp_path / "what?label=x", rows, rows, ["a", "b"])
    assert len(load_dataset(f"parquet:{root}").train) == 6
    assert len(load_dataset(f"parquet:{root}?label=label").train) == 6


def test_parts_with_other_columns_or_classes_are_refused(tmp_path: Path) -> None:
    root = parts(tmp_path / "set", ["train-0.parquet", "train-1.parquet"])
    rows = hub_rows()
    other = write_parquet(tmp_path / "other", rows, rows, ["b", "a"])
    (other / "train-00000-of-00001.parquet").replace(root / "train-1.parquet")
    refused(f"parquet:{root}", "train-1.parquet: other names of classes than in train-0.parquet")
    other = write_parquet(tmp_path / "more", rows, rows, ["a", "b"], image="photo")
    (other / "train-00000-of-00001.parquet").replace(root / "train-1.parquet")
    refused(f"parquet:{root}", "train-1.parquet: other columns than in train-0.parquet")
