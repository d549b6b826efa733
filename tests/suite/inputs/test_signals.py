"""Pictures and sound: real ones, of the form asked for, by the model's own processor where there is one."""

import io
import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.errors import InputError
from deadbench.suite.inputs import signals
from deadbench.suite.inputs.signals import (
    distinct_patches,
    noise_like,
    own_pictures,
    own_sound,
    photo_crops,
    plain_pictures,
)
from deadbench.suite.inputs.specs import content_hash, photo_files


def _png() -> bytes:
    from PIL import Image

    held = io.BytesIO()
    Image.linear_gradient("L").save(held, "png")
    return held.getvalue()


PNG = _png()


def clean(error):
    assert str(error).isprintable()
    assert len(str(error)) < 500


def test_photographs_are_real_and_distinct():
    pixels = plain_pictures(photo_crops("image", 8, 0), torch.empty(1, 3, 32, 48))
    assert pixels.shape == (8, 3, 32, 48)
    assert -1 <= pixels.min() < -0.8
    assert 0.8 < pixels.max() <= 1
    assert distinct_patches(pixels, 16) == 8 * 2 * 3
    assert torch.equal(pixels, plain_pictures(photo_crops("image", 8, 0), torch.empty(1, 3, 32, 48)))
    assert not torch.equal(pixels, plain_pictures(photo_crops("image", 8, 1), torch.empty(1, 3, 32, 48)))


def test_a_folder_of_photographs(tmp_path):
    from PIL import Image

    with pytest.raises(InputError, match="no photographs"):
        photo_crops(f"image:{tmp_path}", 1, 0)
    Image.new("L", (60, 40), 255).save(tmp_path / "white.png")
    assert torch.equal(
        plain_pictures(photo_crops(f"image:{tmp_path}", 2, 0), torch.empty(1, 3, 32, 48)), torch.ones(2, 3, 32, 48)
    )
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken.jpg: not a photograph"):
        photo_crops(f"image:{tmp_path}", 2, 0)


def test_a_picture_of_few_bytes_and_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("1", (10_000, 5_000)).save(tmp_path / "bomb.png")
    assert photo_crops(f"image:{tmp_path}", 1, 0)[0].size == (10_000, 5_000)
    Image.new("1", (10_000, 5_001)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"bomb.png: 10000 x 5001 pixels; at most 50,000,000, of which each"):
        photo_crops(f"image:{tmp_path}", 1, 0)


def test_of_several_photographs_one_is_decoded_at_a_time(tmp_path, monkeypatch):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (30, 20 + number), (50 * number,) * 3).save(tmp_path / f"{number}.png")
    open_now, most, convert = [], [], Image.Image.convert

    def counted(photo, mode):
        decoded = convert(photo, mode)
        open_now.append(weakref.ref(decoded))
        most.append(sum(each() is not None for each in open_now))
        return decoded

    monkeypatch.setattr(Image.Image, "convert", counted)
    pixels = plain_pictures(photo_crops(f"image:{tmp_path}", 10, 0), torch.empty(1, 3, 8, 8))
    assert (len(most), max(most)) == (4, 2), "the next one, and the last one until then"
    grey = [round(float(127.5 * (each.mean() + 1))) for each in pixels]
    assert grey == [50 * (number % 4) for number in range(10)], "in the order of the crops"


def test_pictures_that_are_too_large_together_are_refused(tmp_path, monkeypatch):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    monkeypatch.setattr(signals, "_MOST_PIXELS_AT_ONCE", 10_000)
    with pytest.raises(InputError, match=r"3 pictures of .* pixels together.* at most 10,000") as caught:
        own_pictures(photo_crops("image", 3, 0), tmp_path, {"pixel_values"})
    assert "fails" not in str(caught.value)


@given(st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_picture_of_whatever_bytes_is_taken_or_refused_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "odd"
    folder.mkdir(exist_ok=True)
    jpeg = photo_files("")[0].read_bytes()[:3000]
    whole = bytearray(jpeg if data.draw(st.booleans()) else PNG)
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 200)))] = data.draw(st.integers(0, 255))
    (folder / "odd.png").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        made = plain_pictures(photo_crops(f"image:{folder}", 2, 0), torch.empty(1, 3, 8, 8))
    except InputError as error:
        clean(error)
    else:
        assert made.shape == (2, 3, 8, 8)


def test_hidden_files_and_folders_named_like_photographs_are_none(tmp_path):
    picture = photo_files("")[0].read_bytes()
    (tmp_path / "0.jpg").write_bytes(picture)
    hashed = content_hash(f"image:{tmp_path}")
    (tmp_path / "._0.jpg").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    (tmp_path / "1.jpg").mkdir()
    assert photo_files(str(tmp_path)) == [tmp_path / "0.jpg"]
    assert content_hash(f"image:{tmp_path}") == hashed


def test_other_forms_of_the_same_photographs():
    crops = photo_crops("image", 2, 0)
    still = plain_pictures(crops, torch.empty(1, 3, 32, 32))
    grey = plain_pictures(crops, torch.empty(1, 1, 32, 32))
    torch.testing.assert_close(grey[:, 0], still.mean(1))
    patches = plain_pictures(crops, torch.empty(1, 16, 3 * 8 * 8))
    torch.testing.assert_close(patches[0, 1].reshape(8, 8, 3).permute(2, 0, 1), still[0, :, :8, 8:16])
    film = plain_pictures(crops, torch.empty(1, 4, 3, 32, 32))
    assert film.shape == (2, 4, 3, 32, 32)
    assert all(not torch.equal(film[0, 0], film[0, frame]) for frame in range(1, 4))
    with pytest.raises(InputError, match=r"pictures of shape \[1, 7, 5\]"):
        plain_pictures(crops, torch.empty(1, 7, 5))


def test_noise_is_of_the_form_and_the_seed():
    noise = noise_like(torch.empty(1, 4000), 3, 0)
    assert noise.shape == (3, 4000)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(noise, noise_like(torch.empty(1, 4000), 3, 0))
    assert not torch.equal(noise, noise_like(torch.empty(1, 4000), 3, 1))


def test_the_checkpoints_own_processors_come_first(tmp_path):
    assert own_pictures(photo_crops("image", 1, 0), tmp_path, {"pixel_values"}) is None
    assert own_sound(1, 0, None, {"input_features"}) is None
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 24, "width": 24},
        "do_normalize": False,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    made = own_pictures(photo_crops("image", 3, 0), tmp_path, {"pixel_values"})
    assert made["pixel_values"].shape == (3, 3, 24, 24)
    assert 0 <= made["pixel_values"].min() <= made["pixel_values"].max() <= 1
    assert own_pictures(photo_crops("image", 3, 0), tmp_path, {"something_else"}) == {}
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 8000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor))
    made = own_sound(2, 0, tmp_path, {"input_values"})
    assert made["input_values"].shape == (2, 80000)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    for failing in (
        lambda: own_pictures(photo_crops("image", 1, 0), tmp_path, set()),
        lambda: own_sound(1, 0, tmp_path, set()),
    ):
        with pytest.raises(InputError, match=r"in .* fails") as caught:
            failing()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "told",
    [
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": {"height": 12_000, "width": 12_000}},
        {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 40_000, "width": 40_000}},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 100_000}},
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 10**12},
        {"image_processor_type": "Pix2StructImageProcessor", "max_patches": 10**9},
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[336, 336], [20_000, 20_000]]},
    ],
)
def test_a_processor_that_makes_gigabytes_of_a_picture_is_refused_before_it_does(told, tmp_path):
    processor = {"image_processor_type": "ViTImageProcessor"} | told
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(InputError, match="own image processor makes more than 89,478,485 pixels of one"):
        own_pictures(photo_crops("image", 1, 0), tmp_path, {"pixel_values"})


@pytest.mark.parametrize(
    "told",
    [
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12_845_056},
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[336, 672], [1008, 336]]},
        {"image_processor_type": "CLIPImageProcessor"},
    ],
)
def test_processors_as_they_are_published_are_not(told, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    assert own_pictures(photo_crops("image", 1, 0), tmp_path, {"pixel_values"})["pixel_values"].numel()


def test_an_extractor_of_too_much_sound_is_refused(tmp_path):
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 10**10}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor))
    with pytest.raises(InputError, match="its sampling rate is 10000000000; for 2 items at most 400,000,000 values"):
        own_sound(2, 0, tmp_path, {"input_values"})


def test_a_program_that_is_called_a_picture_is_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a.png: not a photograph that can be opened \(UnidentifiedImageError"):
        photo_crops(f"image:{tmp_path}", 1, 0)
