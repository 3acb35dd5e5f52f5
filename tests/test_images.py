"""Folders of anybody's images: what they are cut to, which class they are, and what becomes of a broken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from hcompress.errors import DataError
from hcompress.images import ZOO_DATA, Arrays, Folder, ImageStream, open_images
from hcompress.meter import CLEAR
from hcompress.models.decoder import Decoder, load_encoder
from hcompress.recipe import resolve
from hcompress.rundir import RunDir
from hcompress.schedule import Schedule
from hcompress.setting import open_setting
from hcompress.train import train
from hcompress.zoo.fashion import fashion_folder, load_fashion

CPU = torch.device("cpu")
ZOO_MODEL = "zoo:fashion-dit"


def paint(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def stream_of(folder, seed=0, classes=5, **more):
    return ImageStream(Folder(folder, 8, 1, classes), seed, None, CPU, **more)


def value(sample):
    return round((sample.mean().item() + 1) * 127.5)


def test_each_epoch_shows_every_image_once_in_another_order(tmp_path):
    for number in range(7):
        paint(tmp_path / f"{number}.png", 10 * number)
    samples, _ = stream_of(tmp_path).batch(0, 21, flip=False)
    shown = [value(sample) // 10 for sample in samples]
    epochs = [shown[:7], shown[7:14], shown[14:]]
    assert all(sorted(epoch) == [*range(7)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 3
    again, _ = stream_of(tmp_path).batch(9, 4, flip=False)
    assert torch.equal(again, samples[9:13])  # whatever was asked for before
    other, _ = stream_of(tmp_path, seed=1).batch(0, 21, flip=False)
    assert not torch.equal(other, samples)


def test_a_broken_file_is_named_counted_once_and_replaced(tmp_path):
    for number in range(5):
        paint(tmp_path / f"{number}.png", 10 * number)
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("is not asked")
    said = []
    stream = stream_of(tmp_path, on_broken=said.append)
    samples, classes = stream.batch(0, 70, flip=False)
    assert samples.shape == (70, 1, 8, 8) and classes == [None] * 70
    assert {value(sample) // 10 for sample in samples} == {0, 1, 2, 3, 4}
    assert sorted(stream.broken) == [str(tmp_path / name) for name in ("broken.png", "text.jpg")]
    assert len(said) == 2 and all("cannot be read (" in line and "\n" not in line for line in said)


def test_classes_are_sub_folders_by_number_or_in_order(tmp_path):
    for number in (0, 3):
        paint(tmp_path / "numbers" / str(number) / "deep" / "a.png", 10 * number)
    samples, classes = stream_of(tmp_path / "numbers").batch(0, 2, flip=False)
    assert [10 * label for label in classes] == [value(sample) for sample in samples]
    for order, name in enumerate(("apple", "bean", "cat", "dog", "egg")):
        paint(tmp_path / "names" / name / "a.png", 10 * order)
    samples, classes = stream_of(tmp_path / "names").batch(0, 5, flip=False)
    assert [10 * label for label in classes] == [value(sample) for sample in samples]


def test_pictures_are_cut_to_their_middle_and_scaled_to_one(tmp_path):
    wide = np.zeros((40, 120), np.uint8)
    wide[:, 40:80] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture = Folder(tmp_path, 8, 3, None).picture(0)
    assert picture.shape == (3, 8, 8) and (picture[:, :, 1:-1] == 1).all()  # the cut's own edge is blurred
    assert Folder(tmp_path, 40, 1, None).picture(0).min() == 1.0
    assert Folder(tmp_path, 100, 1, None).picture(0).shape == (1, 100, 100)  # a small image is enlarged


def test_flipping_mirrors_half_of_them():
    pixels = np.broadcast_to(np.linspace(-1, 1, 8, dtype=np.float32), (1, 1, 8, 8))
    stream = ImageStream(Arrays(pixels, np.zeros(1, np.int64)), 0, None, CPU)
    samples, classes = stream.batch(0, 100, flip=True)
    mirrored = [sample[0, 0, 0].item() == 1 for sample in samples]
    assert 30 <= sum(mirrored) <= 70 and classes == [0] * 100  # four standard deviations of 100 draws
    assert all(torch.equal(sample.flip(2) if turned else sample, torch.from_numpy(pixels[0].copy()))
               for sample, turned in zip(samples, mirrored, strict=True))  # fmt: skip


def test_arrays_without_labels_are_of_no_class():
    pixels = np.zeros((2, 1, 8, 8), np.float32)
    assert ImageStream(Arrays(pixels), 0, None, CPU).batch(0, 2, flip=False)[1] == [None, None]


@pytest.mark.skipif(not fashion_folder().is_dir(), reason="no Fashion-MNIST; hcompress zoo fetch-data fashion")
def test_pictures_of_the_zoo_take_a_byte_a_pixel_and_are_what_its_models_were_trained_on():
    source, (images, labels) = ZOO_DATA[ZOO_MODEL](), load_fashion("train")
    assert source.pixels.nbytes == images.size
    for index in range(0, len(source), 997):
        picture = source.picture(index)
        assert picture.dtype == np.float32 and np.array_equal(picture, images[index])
        assert source.label(index) == labels[index]


def train_zoo_model(out, method, rounds):
    flags = {"model": ZOO_MODEL, "solver.steps": 4, "caching.method": method, "caching.beta": 1e-3}
    train(resolve(None, flags | {f"caching.{rounds}": 1, "caching.batch": 1}), out)


@pytest.mark.skipif(not CLEAR.exists(), reason="this system does not tell a process's peak")
def test_what_images_take_in_memory_is_not_what_training_takes(tmp_path, monkeypatch):
    count = 500_000  # 392 MB of them, of which training this model takes a fifth

    def pictures():
        return Arrays(np.full((count, 1, 28, 28), 7, np.uint8), np.zeros(count, np.int64))

    monkeypatch.setitem(ZOO_DATA, ZOO_MODEL, pictures)
    train_zoo_model(tmp_path, "learning-to-cache", "sweeps")
    (record,) = RunDir(tmp_path).records()
    assert 0 < record["peak_memory_bytes"] < count * 784 / 2


def test_a_method_without_images_opens_none(tmp_path, monkeypatch):
    monkeypatch.delitem(ZOO_DATA, ZOO_MODEL)
    train_zoo_model(tmp_path / "harmonica", "harmonica", "trajectories")
    with pytest.raises(DataError, match="comes with no images"):
        train_zoo_model(tmp_path / "images", "learning-to-cache", "sweeps")


def test_latents_are_drawn_from_what_the_vae_gives_and_decode_to_the_picture(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=2,
                        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                        scaling_factor=0.5, shift_factor=0.25)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    encoder = load_encoder(tmp_path)
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    stream = ImageStream(Arrays(pixels, np.arange(3)), 0, encoder, CPU)
    latents, classes = stream.batch(0, 3, flip=False)
    assert latents.shape == (3, 2, 8, 8) and encoder.scale_down == 2
    posterior = encoder.vae.encode(torch.from_numpy(pixels[classes])).latent_dist
    drawn = (latents / 0.5 + 0.25 - posterior.mean) / posterior.std
    assert abs(drawn.mean()) < 0.2 and 0.8 < drawn.std() < 1.2  # 384 draws of unit variance
    assert torch.equal(latents[1:], stream.batch(1, 2, flip=False)[0])
    torch.testing.assert_close(
        Decoder(encoder.vae)(latents), encoder.vae.decode(latents / 0.5 + 0.25, return_dict=False)[0]
    )
    assert load_encoder(tmp_path / "vae") is None


def test_what_holds_no_images_is_refused_in_one_line(tmp_path, tiny_run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        Folder(tmp_path / "empty", 8, 1, None)
    with pytest.raises(DataError, match="no folder"):
        Folder(tmp_path / "absent", 8, 1, None)
    paint(tmp_path / "odd" / "apple" / "a.png", 1)
    with pytest.raises(DataError, match=r"1 sub-folders \(apple, ...\) but this model has 5 classes"):
        stream_of(tmp_path / "odd")
    (tmp_path / "empty" / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"none of 1 images can be read; the first is .*a\.png"):
        stream_of(tmp_path / "empty").batch(0, 1, flip=False)
    setting = open_setting(str(tiny_run.parent / "model"), "ddim", 4, 1.5)
    with pytest.raises(DataError, match="comes with no images; pass --images FOLDER"):
        open_images(setting, 0, None)


def test_train_learns_from_a_folder_and_counts_what_it_left_out(tmp_path, tiny_run):
    for number in range(4):
        paint(tmp_path / "images" / str(number) / "a.png", 60 * number, size=(20, 30))
    (tmp_path / "images" / "0" / "b.png").write_text("no image")
    command = [sys.executable, "-m", "hcompress.cli.main", "train", str(tiny_run.parent / "model"), "--steps", "4"]
    command += ["--method", "learning-to-cache", "--images", str(tmp_path / "images"), "--beta", "1e-3", "--json"]
    command += ["--set", "caching.sweeps=4", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["method"], result["images_skipped"]) == ("learning-to-cache", 1)
    assert done.stderr.count("b.png cannot be read") == 1
    schedule = Schedule.load(tmp_path / "run" / "schedule.safetensors")
    assert schedule.method["images_used"] == 5 and schedule.compute[::2].all()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"recipe.yaml", "env.json", "metrics.jsonl", "checkpoint.pt", "schedule.safetensors", "heatmap.png"}
