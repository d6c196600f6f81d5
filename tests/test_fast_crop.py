"""data.decode=fast against torchvision's own transforms, pictures that leave the workers as uint8, tokens a batch."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from shards import make_shards, tiny_model
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from vlcl.config import load_config
from vlcl.data import fast_crop as module
from vlcl.data.decode import BROKEN_IMAGE, BadSample, decode_image, open_image
from vlcl.data.fast_crop import FastCrop, crop_box, fast_crop
from vlcl.data.manifest import open_source
from vlcl.data.preprocess import Augmentation, augmented, in_two_parts
from vlcl.data.reader import Decoder, ShardReader, Sources
from vlcl.from_config import make_reader
from vlcl.model import build_model

spec = importlib.util.find_spec("sklearn")  # its photographs, not its modules
assert spec is not None
assert spec.submodule_search_locations
PHOTOS = [
    *(Path(spec.submodule_search_locations[0], "datasets", "images", name) for name in ("china.jpg", "flower.jpg")),
    Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg"),
]


def photo(number: int) -> Image.Image:
    with Image.open(PHOTOS[number]) as image:
        return image.convert("RGB")


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


PLAIN = Augmentation()
image_transform: Any = open_clip.image_transform  # typed by all that it may return


def both(data: bytes, side: int, how: Augmentation = PLAIN) -> tuple[np.ndarray, np.ndarray]:
    """The picture as training has it without and with data.decode=fast, of the same random numbers."""
    preprocess = augmented(image_transform(side, is_train=True), how)
    fast = fast_crop(preprocess)
    assert fast is not None
    torch.manual_seed(3)
    exact = in_two_parts(preprocess).picture(decode_image(data))
    torch.manual_seed(3)
    found = fast(open_image(data))
    assert (found.shape, found.dtype, found.is_contiguous()) == (exact.shape, torch.uint8, True)
    return exact.numpy().astype(float), found.numpy().astype(float)


def test_crops_are_those_of_torchvision() -> None:
    rng = np.random.default_rng(0)
    for trial in range(120):
        width, height = (int(x) for x in rng.integers(1, 900, size=2))
        scale, ratio = [((0.9, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 1.5)), ((1.0, 1.0), (1.0, 1.0))][trial % 3]
        crop = RandomResizedCrop(224, scale, ratio, interpolation=InterpolationMode.BICUBIC)
        torch.manual_seed(trial)
        top, left, h, w = crop.get_params(torch.empty(3, height, width, device="meta"), list(scale), list(ratio))
        after = torch.get_rng_state()
        torch.manual_seed(trial)
        assert crop_box(crop, width, height) == (left, top, w, h)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("side", [32, 64, 112, 224])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.3, 0.6)])
def test_photographs_are_within_two_of_255_in_the_mean(side: int, scale: tuple[float, float]) -> None:
    for number in range(len(PHOTOS)):
        picture = photo(number)
        for data in (
            PHOTOS[number].read_bytes(),
            encoded(picture.resize((1100, 800)), quality=90),
            encoded(picture.crop((101, 90, 461, 393)), quality=75, subsampling=0),
            encoded(picture, "PNG", compress_level=1),
        ):
            exact, fast = both(data, side, Augmentation(crop_scale=scale))
            assert np.abs(exact - fast).mean() < 2.0


def test_what_is_not_decoded_smaller_is_within_one() -> None:
    for data in (encoded(photo(0), "PNG", compress_level=1), encoded(photo(1).crop((0, 0, 260, 240)))):
        exact, fast = both(data, 224)
        assert np.abs(exact - fast).max() <= 1
        assert np.abs(exact - fast).mean() < 0.05


@pytest.mark.parametrize("size", [(2000, 1500), (900, 700), (500, 375), (230, 2000)])
def test_no_picture_is_decoded_smaller_than_the_model_wants(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, tuple[int, int]]] = []
    real = module.load_image

    def load(image: Image.Image, background: str, reduced: int = 1) -> Image.Image:
        loaded = real(image, background, reduced)
        taken.append((reduced, loaded.size))
        return loaded

    monkeypatch.setattr(module, "load_image", load)
    crop = FastCrop(RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC), [], "bicubic")
    data = encoded(photo(0).resize(size))
    for share in (1.0, 0.6, 0.2):
        w, h = (round(share * x) for x in size)
        crop.resized(open_image(data), (size[0] - w, size[1] - h, w, h))
        reduced, found = taken[-1]
        assert found == tuple(-(-x // reduced) for x in size)
        assert reduced == 1 or min(w, h) / reduced >= 1.5 * 224
        assert reduced == 8 or min(w, h) / (2 * reduced) < 1.5 * 224  # nor larger than that
    assert [reduced for reduced, _ in taken] == {2000: [4, 2, 1], 900: [2, 1, 1]}.get(size[0], [1, 1, 1])


def test_turned_grey_and_transparent_pictures() -> None:
    picture = photo(0).resize((900, 640))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    for data, most in (
        (encoded(picture, exif=exif), 0.05),
        (encoded(clear, "PNG", compress_level=1), 0.05),
        (encoded(picture.convert("L")), 2.0),
        (encoded(picture.convert("CMYK")), 2.0),
    ):
        exact, fast = both(data, 64)
        assert np.abs(exact - fast).mean() < most


def test_steps_after_the_crop_draw_the_same_numbers() -> None:
    how = Augmentation(flip_prob=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1), gray_scale_prob=0.2, blur_prob=0.5)
    for number in range(3):
        exact, fast = both(encoded(photo(number), "PNG", compress_level=1), 64, how)
        assert np.abs(exact - fast).mean() < 0.5


@pytest.mark.parametrize("size", [(500, 375), (1600, 1200)])
def test_a_file_cut_short_is_bad_as_ever(size: tuple[int, int]) -> None:
    data = encoded(photo(0).resize(size))
    fast = fast_crop(image_transform(64, is_train=True))
    assert fast is not None
    for attempt in (decode_image, lambda data: fast(open_image(data))):
        with pytest.raises(BadSample, match=BROKEN_IMAGE):
            attempt(data[: len(data) // 2])


def test_other_preprocessing_stays_as_it_is() -> None:
    assert fast_crop(image_transform(64, is_train=False)) is None
    assert fast_crop(lambda image: torch.zeros(3)) is None


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("cache", ["null", "memory"])
def test_uint8_pictures_and_tokens_of_a_batch_have_the_bits_of_one_at_a_time(
    tmp_path: Path, decode: str, cache: str
) -> None:
    """A quarter of the bytes from the workers, then the numbers that training had."""
    folder = make_shards(tmp_path / "shards", (6, 6))
    sources = Sources((open_source(str(folder)),))
    built = build_model(tiny_model(tmp_path / "model"))
    config = load_config(None, ["data.train=x", f"data.decode={decode}", f"data.cache={cache}"])
    reader: Any = make_reader("data.train", config, sources, built)
    samples = [sample for shard in (0, 1) for _, sample in reader.read(shard, 0, 6)]
    torch.manual_seed(0)
    batch = reader.stack([reader.prepare(sample, 0, row) for row, sample in enumerate(samples)])
    assert batch.images_BCHW.dtype == torch.uint8
    torch.manual_seed(0)
    preprocess: Any = built.preprocess_train
    if decode == "fast":
        fast: Any = fast_crop(preprocess)
        to_tensor, normalize = preprocess.transforms[-2:]
        preprocess = lambda image: normalize(to_tensor(fast(image).permute(1, 2, 0).numpy()))  # noqa: E731
    decoder: Any = Decoder(preprocess, built.tokenize)
    shards = ShardReader(sources, decoder)
    raw: list[Any] = [sample for shard in (0, 1) for _, sample in shards.read(shard, 0, 6)]
    pairs = [decoder.raw(sample.files) for sample in raw]
    expected = torch.stack([preprocess(image) for image, _ in pairs])
    assert torch.equal(built.encoder.normalized(batch.images_BCHW), expected)
    assert torch.equal(built.encoder.image(batch.images_BCHW), built.encoder.image(expected))
    assert torch.equal(batch.tokens_BL, torch.cat([built.tokenize([captions.texts[0]]) for _, captions in pairs]))


def test_words_left_out_at_random_are_those_of_the_sample(tmp_path: Path) -> None:
    sources = Sources((open_source(str(make_shards(tmp_path, (4,)))),))
    tokenize: Any = open_clip.SimpleTokenizer(context_length=5, reduction_mask="shuffle")
    reader = ShardReader(sources, Decoder(lambda image: torch.zeros(3), tokenize))
    samples: list[Any] = [sample for _, sample in reader.read(0, 0, 4)]

    def tokens(rows: list[int]) -> torch.Tensor:
        prepared = []
        for row in rows:
            torch.manual_seed(row)
            prepared.append(reader.prepare(samples[row], 0, row))
        return reader.stack(prepared).tokens_BL

    assert torch.equal(tokens([0, 1, 2, 3])[[2, 0]], tokens([2, 0]))
