import io
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun.data.examples import TensorExamples
from sslrun.data.image import images as module
from sslrun.data.image.images import (
    Decoder,
    EncodedSplit,
    StreamedImages,
    convert_arrays,
    find_native_side,
    load_images,
)
from sslrun.errors import UserError

CPU = torch.device("cpu")


class Memory:
    """Encoded images in memory; None stands for a damaged one."""

    def __init__(self, contents):
        self.contents = contents
        self.reads = 0

    def __len__(self):
        return len(self.contents)

    def read(self, index):
        self.reads += 1
        return self.contents[index] or b"no image at all"

    def name(self, index):
        return f"image {index}"


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def colored(count, side=8):
    return noise(count, side, side, 3)


def memory(pixels):
    return Memory([encoded(Image.fromarray(pixel)) for pixel in pixels])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "2")
    return tmp_path / "cache"


def load(images, labels=None, size=None, skip_corrupt=False, progress=None, identity=None):
    split = EncodedSplit(images, labels, ("a", "b") if labels is not None else ())
    return load_images(
        "set-train", identity or {"id": 1}, lambda: split, size, skip_corrupt, progress
    )


# ---------------------------------------------------------------- decoding


def test_decoding_without_resizing_is_exact():
    pixels = colored(3)
    images = memory(pixels)
    assert all((Decoder(8)(images, index) == pixels[index]).all() for index in range(3))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_the_same_rgb(mode):
    image = (
        Image.fromarray(np.where(noise(8, 8) > 127, 255, 0).astype(np.uint8))
        .convert("RGB")
        .convert(mode)
    )
    format = "TIFF" if mode == "CMYK" else "PNG"
    decoded = Decoder(8)(Memory([encoded(image, format)]), 0)
    assert decoded.shape == (8, 8, 3)
    assert (decoded == np.asarray(image.convert("RGB"))).all()


def test_sixteen_bit_gray_keeps_its_high_byte():
    gray = noise(8, 8).astype(np.uint16)
    decoded = Decoder(8)(Memory([encoded(Image.fromarray(gray * 256 + 7))]), 0)
    assert (decoded == gray[:, :, None]).all()


def test_orientation_tag_is_applied():
    pixels = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise by 90 degrees
    decoded = Decoder(8)(Memory([encoded(Image.fromarray(pixels), exif=exif)]), 0)
    assert (decoded == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize(("width", "height"), [(48, 24), (24, 48), (49, 24)])
def test_the_shorter_side_is_resized_and_the_center_cropped(width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 4 : height - height // 4, width // 4 : width - width // 4] = 200
    image = Image.fromarray(pixels)
    decoded = Decoder(12)(Memory([encoded(image)]), 0)
    scale = 12 / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 12) // 2, (whole.height - 12) // 2
    assert (decoded == np.asarray(whole)[top : top + 12, left : left + 12]).all()


def test_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same():
    y, x = np.mgrid[:512, :640]
    smooth = np.stack(
        [127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 50), (x + y) / 5], -1
    ).astype(np.uint8)
    jpeg = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    decoded = Decoder(32)(Memory([jpeg]), 0).astype(int)
    full = (
        Image.open(io.BytesIO(jpeg))
        .resize((40, 32), Image.Resampling.BILINEAR)
        .crop((4, 0, 36, 32))
    )
    assert np.abs(decoded - np.asarray(full).astype(int)).mean() < 2


def test_arrays_are_resized_like_images_and_gray_gets_three_channels():
    gray = noise(5, 6, 6)
    images = convert_arrays(gray, 12)
    assert images.shape == (5, 3, 12, 12)
    assert images.dtype == torch.uint8
    assert (images[:, :1] == images).all()
    one = np.asarray(Image.fromarray(gray[0]).resize((12, 12), Image.Resampling.BILINEAR)).astype(
        int
    )
    assert np.abs(images[0, 0].numpy().astype(int) - one).max() <= 1
    assert (convert_arrays(colored(2)).permute(0, 2, 3, 1).numpy() == colored(2)).all()
    assert (convert_arrays(gray[..., None]) == torch.from_numpy(gray)[:, None]).all()


def test_arrays_of_another_kind_are_rejected():
    with pytest.raises(UserError, match=r"float64.*should be uint8, uint16 or float32"):
        convert_arrays(np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match=r"of shape \(N, H, W\) or"):
        convert_arrays(np.zeros((2, 4, 4, 17), np.uint8))
    with pytest.raises(UserError, match=r"6x4, not square.*size: 32"):
        convert_arrays(np.zeros((2, 4, 6), np.uint8))


# ---------------------------------------------------------------- sizes and damage


def test_images_of_unequal_sizes_need_a_size():
    images = Memory(
        [encoded(Image.fromarray(noise(8, 8, 3))), encoded(Image.fromarray(noise(12, 8, 3)))]
    )
    with pytest.raises(UserError, match=r"image 1: is 8x12.*8x8.*as in size: 8"):
        load(images)
    assert load(images, size=8).inputs.shape == (2, 3, 8, 8)


def test_first_image_that_is_not_square_needs_a_size():
    with pytest.raises(UserError, match=r"image 0: is 20x9, not square.*as in size: 8"):
        find_native_side(Memory([encoded(Image.fromarray(noise(9, 20, 3)))]))


def test_damaged_image_is_named_or_skipped(caplog):
    pixels = colored(5)
    contents = memory(pixels).contents
    jpeg = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    damaged = Memory([None, contents[1], contents[2][:60], contents[3], jpeg[: len(jpeg) // 2]])
    labels = torch.tensor([0, 1, 0, 1, 0])
    with pytest.raises(
        UserError, match=r"image 0: cannot be decoded \(not an image\).*skip_corrupt: true"
    ):
        load(damaged, labels, size=8)
    for _ in range(2):  # first decoded, then read from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            kept = load(damaged, labels, size=8, skip_corrupt=True)
        assert kept.labels.tolist() == [1, 1]
        assert (kept.inputs.permute(0, 2, 3, 1).numpy() == pixels[[1, 3]]).all()
        assert [record.message for record in caplog.records] == [
            "set-train: skipped 3 images that cannot be decoded"
        ]


def test_only_damaged_images_are_an_error():
    with pytest.raises(UserError, match=r"set-train: none of its 2 images can be decoded"):
        load(Memory([None, None]), size=8, skip_corrupt=True)
    with pytest.raises(UserError, match=r"neither can any other of the 2 images"):
        load(Memory([None, None]), skip_corrupt=True)


# ---------------------------------------------------------------- the cache


def test_second_load_reads_the_cache_and_a_change_of_the_key_does_not():
    images = memory(colored(4))
    labels = torch.tensor([0, 1, 1, 0])
    first = load(images, labels)
    before = images.reads
    again = load(images, labels)
    assert images.reads == before
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(again.labels, labels)
    assert again.classes == ("a", "b")
    assert again.spec.size == 8
    load(images, labels, identity={"id": 2})
    assert images.reads > before
    assert load(images, labels, size=4).spec.size == 4


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "foreign"])
def test_a_damaged_cache_entry_is_rebuilt(cache, damage):
    images = memory(colored(4))
    first = load(images).inputs.clone()
    (entry,) = cache.glob("images/*.safetensors")
    content = entry.read_bytes()
    entry.unlink()  # the loaded tensor maps the old file
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"something": torch.zeros(2)}, entry)
    else:
        entry.write_bytes(
            {"cut": content[:-50], "header": b"\xff" * 64 + content[64:], "empty": b""}[damage]
        )
    assert torch.equal(load(images).inputs, first)
    reads = images.reads
    assert torch.equal(load(images).inputs, first)
    assert images.reads == reads


def test_failed_decoding_leaves_nothing_behind(cache):
    with pytest.raises(UserError):
        load(Memory([*memory(colored(2)).contents, None]))
    assert not list(cache.glob("images/*.safetensors"))
    assert not list(cache.glob("images/.*"))


def test_unwritable_cache_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*set SSLRUN_CACHE"):
        load(memory(colored(2)))


def test_two_concurrent_loads_decode_once():
    images = memory(colored(300))
    threads = [threading.Thread(target=load, args=(images,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images.reads <= 300 + 2  # plus the header of the first image, which both read


def test_progress_counts_to_the_end():
    calls = []
    load(memory(colored(600, side=2)), progress=lambda *arguments: calls.append(arguments))
    assert calls == [("set-train", 256, 600), ("set-train", 512, 600), ("set-train", 600, 600)]


def test_workers_follow_the_environment(monkeypatch):
    monkeypatch.setenv("SSLRUN_WORKERS", "3")
    assert module.count_workers() == 3
    monkeypatch.setenv("SSLRUN_WORKERS", "many")
    with pytest.raises(UserError, match=r"SSLRUN_WORKERS=many"):
        module.count_workers()
    monkeypatch.delenv("SSLRUN_WORKERS")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert module.count_workers() == 2


# ---------------------------------------------------------------- streaming


@pytest.fixture
def streaming(monkeypatch):
    monkeypatch.setattr(module, "MAX_TENSOR_BYTES", 1000)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("count", ["0", "2"])
def test_streamed_batches_equal_those_of_the_tensor(monkeypatch, count):
    monkeypatch.setenv("SSLRUN_WORKERS", count)
    pixels, labels = colored(20), torch.arange(20) % 2
    streamed = load(memory(pixels), labels)
    assert isinstance(streamed, StreamedImages)
    assert streamed.spec.size == 8
    whole = TensorExamples(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, ("a", "b"), streamed.spec
    )
    chosen = torch.tensor([3, 19, 4, 7, 0, 11, 5])
    order = [torch.tensor([6, 1, 0]), torch.tensor([2, 3]), torch.tensor([5])]
    before = torch.get_rng_state()
    for one, two in ((streamed, whole), (streamed.subset(chosen), whole.subset(chosen))):
        assert len(one) == len(two)
        for a, b in zip(one.batches(order, CPU), two.batches(order, CPU), strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.labels, b.labels)
    twice = streamed.subset(chosen).subset(torch.tensor([1, 0]))
    assert torch.equal(next(twice.batches([torch.tensor([0])], CPU)).inputs[0], whole.inputs[19])
    assert torch.equal(
        torch.get_rng_state(), before
    )  # a run's random draws do not depend on how data is stored


@pytest.mark.usefixtures("streaming")
def test_stream_draws_its_order_lazily(monkeypatch):
    monkeypatch.setenv("SSLRUN_WORKERS", "0")
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield torch.tensor([0, 1])

    batches = load(memory(colored(20))).batches(endless(), CPU)
    for _ in range(3):
        next(batches)
    assert len(drawn) == 3


@pytest.mark.usefixtures("streaming")
def test_a_damaged_image_in_a_stream_is_a_one_line_error(monkeypatch):
    contents = memory(colored(20)).contents
    contents[7] = None
    streamed = load(Memory(contents))
    with pytest.raises(UserError) as error:
        list(streamed.batches([torch.arange(10)], CPU))
    assert str(error.value).startswith("image 7: cannot be decoded")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("streaming")
def test_a_stream_can_skip_its_damaged_images(caplog):
    pixels = colored(20)
    contents = memory(pixels).contents
    contents[0] = contents[7] = None
    images = Memory(contents)
    streamed = load(images, torch.arange(20) % 2, skip_corrupt=True)
    assert len(streamed) == 18
    assert "set-train: skipped 2 images" in caplog.text
    (batch,) = streamed.batches([torch.tensor([0, 6, 17])], CPU)
    assert (batch.inputs.permute(0, 2, 3, 1).numpy() == pixels[[1, 8, 19]]).all()
    assert batch.labels.tolist() == [1, 0, 1]
    before = images.reads
    assert len(load(images, torch.arange(20) % 2, skip_corrupt=True)) == 18
    assert images.reads <= before + 2  # cached, except for the size
