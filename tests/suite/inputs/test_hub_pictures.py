"""Pictures of a Hub dataset: in order, as many as are asked for; the Hub is a folder here."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from PIL import Image

from deadbench.suite.errors import InputError
from deadbench.suite.inputs import hub_files, signals
from deadbench.suite.inputs.hub_files import DatasetError, values_once, why_unreachable
from deadbench.suite.inputs.hub_pictures import read_hub_pictures
from deadbench.suite.inputs.signals import photo_crops, pictures_of
from tests.suite.architectures.test_locate import VISION
from tests.suite.inputs.test_feed import made, rows_of

GREYS = (10, 60, 110, 160, 210)


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((24, 32, 3), grey, np.uint8)).save(file, "png")
    return file.getvalue()


def save(root: Path, name: str, columns: dict[str, list]) -> None:
    path = root / "datasets/org" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is a folder, which is asked for anew."""
    cells = [{"bytes": png(grey), "path": f"{grey}.png"} for grey in GREYS]
    save(tmp_path, "photos/data/validation-0-of-2.parquet", {"image": cells[:3], "label": [1, 2, 3]})
    save(tmp_path, "photos/data/validation-1-of-2.parquet", {"image": cells[3:], "label": [4, 5]})
    save(tmp_path, "bare/train.parquet", {"picture": [png(7)]})
    save(tmp_path, "paths/train.parquet", {"image": [{"bytes": b"", "path": "a"}, {"bytes": None, "path": "b"}]})
    save(tmp_path, "words/train.parquet", {"text": ["one"], "label": [1]})
    (tmp_path / "datasets/org/broken").mkdir()
    (tmp_path / "datasets/org/broken/train.parquet").write_text("not a parquet file")
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: DirFileSystem(str(tmp_path)))
    why_unreachable.cache_clear()
    yield
    why_unreachable.cache_clear()


def test_pictures_come_in_order_of_the_files_and_no_more_than_are_asked_for(hub):
    crops = photo_crops("hf:org/photos::validation", 4, 0)
    assert [np.asarray(crop)[0, 0, 0] for crop in pictures_of(crops)] == list(GREYS[:4])
    crops = photo_crops("hf:org/photos::validation", 7, 0)
    assert [np.asarray(crop)[0, 0, 0] for crop in pictures_of(crops[:5])] == list(GREYS), "then crops of them"
    assert len(crops) == 7
    ((name, encoded),) = read_hub_pictures("org/bare")
    assert (name, encoded) == ("hf:org/bare, row 0 of train.parquet", png(7))


def test_a_model_of_pictures_is_fed_with_them(hub):
    _, part, inputs = made("vit", VISION, spec="hf:org/photos::validation", modality="image", num_tokens=40)
    assert inputs.description.startswith("hf:org/photos::validation")
    assert inputs.num_tokens == rows_of(part, inputs) >= 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("org/words", "no column of pictures; its columns: text, label"),
        ("org/photos", "no parquet files for that configuration and split"),
        ("org/paths", "train.parquet, row 1 has no bytes of a picture"),
    ],
)
def test_what_has_no_pictures_is_one_line(hub, spec, message):
    with pytest.raises(DatasetError, match=message):
        list(read_hub_pictures(spec))


def test_bytes_that_are_no_picture_are_told_by_their_row(hub):
    with pytest.raises(InputError, match=r"hf:org/paths, row 0 of train.parquet: not a photograph"):
        photo_crops("hf:org/paths", 1, 0)


def test_why_a_dataset_cannot_be_had(hub, monkeypatch):
    assert why_unreachable("org/photos::validation") is None
    assert why_unreachable("org/words") is None
    assert "train.parquet: not a parquet file" in why_unreachable("org/broken")
    assert "no parquet files" in why_unreachable("org/nothing")

    class Gated(DirFileSystem):
        def cat_file(self, *arguments, **options):
            raise PermissionError("403: accept its terms")

    monkeypatch.setattr(hub_files, "dataset_files", lambda spec: (Gated("."), ["a.parquet"]))
    assert "'hf:org/gated' cannot be reached (PermissionError: 403: accept its terms)" in why_unreachable("org/gated")


def test_pictures_that_are_more_than_can_be_held_are_refused(hub, monkeypatch):
    monkeypatch.setattr(signals, "_MOST_BYTES_HELD", 2 * len(png(10)))
    with pytest.raises(InputError, match=r"row 2 of .*: the pictures up to it have [\d,]+ bytes; at most .* of 4"):
        photo_crops("hf:org/photos::validation", 4, 0)


def test_a_column_whose_statistics_do_not_fit_ends_nothing():
    """Arrow ends the process that asks for its metadata."""
    file = io.BytesIO()
    pq.write_table(pa.table({"bytes": [[b"x"]]}), file, compression="none", use_dictionary=False)
    levels = b"\x26\x02\x00\x19"  # how many values are at each of two levels of repetition: 1 and 0
    assert levels in file.getvalue()
    torn = io.BytesIO(file.getvalue().replace(levels, b"\x16\x82\x00\x19"))  # as long, and of one level
    with pytest.raises(OSError, match="histogram size mismatch"):
        list(values_once(torn, "bytes", 1))
