"""FID and its kin through the real network with random weights: what must hold whatever the weights are.

Published figures cannot be checked here, since the weights are not at hand: the formulas, the layers, the files and
what is refused can.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CALLS, CFG, make_dit
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from hcompress.errors import DataError, ModelError
from hcompress.metrics.distances import moments
from hcompress.metrics.image_sets import open_set
from hcompress.metrics.inception import POOL, SPATIAL, Features, Inception, _network_module, _weights, features_of
from hcompress.metrics.published import inception_score, kernel_inception_distance, published_metrics
from hcompress.metrics.reference import Reference, cache_folder, load_reference
from hcompress.report.published import Generated

pytestmark = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
N, SIDE = 5, 24


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the right shapes, such that features differ from picture to picture."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"

    class Untrained(_network_module().FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            """The constructor loads weights; there are none yet."""

    torch.save({}, file)
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=file)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    return Inception(weights)


def pictures(seed: int, count: int = N, side: int = SIDE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def write_folder(folder: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Path:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
    return folder


def random_features(seed: int, count: int, shift: float = 0.0) -> Features:
    rng = torch.Generator().manual_seed(seed)
    pool, spatial = (torch.randn(count, 8, generator=rng) + shift for _ in range(2))
    return Features(pool, spatial, torch.randn(count, 10, generator=rng))


def reference_of(features: Features, pool: bool = True) -> Reference:
    return Reference("real", moments(features.pool), moments(features.spatial), features.pool if pool else None)


def test_features_are_those_of_the_layers_that_adm_names(inception: Inception) -> None:
    """`mixed_6/conv` is a 1x1 convolution, batch norm and ReLU of what `mixed_5` gives; 7 channels, channels last."""
    seen: list[Tensor] = []
    hook = inception.network.Mixed_6c.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    found = inception(torch.from_numpy(pictures(0, 2)).permute(0, 3, 1, 2))
    hook.remove()
    layer = inception.network.Mixed_6d.branch1x1
    expected = functional.relu(layer.bn(functional.conv2d(seen[0], layer.conv.weight)))[:, :7]
    assert found.pool.shape == (2, POOL) and found.spatial.shape == (2, SPATIAL)
    assert torch.equal(found.spatial.reshape(2, 17, 17, 7), expected.permute(0, 2, 3, 1))
    assert found.logits.shape == (2, 1008)
    torch.testing.assert_close(found.logits, found.pool @ inception.network.fc.weight.T)  # no bias
    assert (found.pool[0] - found.pool[1]).abs().max() > 1e-3  # or the other tests would compare nothing


def test_a_folder_and_an_npz_of_the_same_pictures_are_the_same_set(tmp_path: Path) -> None:
    pixels = pictures(0)
    np.savez(tmp_path / "set.npz", arr_0=pixels, arr_1=np.zeros(N))
    sets = [open_set(write_folder(tmp_path / "set", pixels)), open_set(tmp_path / "set.npz")]
    for images in sets:
        numbers, batches = zip(*images.batches(2), strict=True)
        assert [len(batch) for batch in batches] == [2, 2, 1] and [*numbers[0], *numbers[1], *numbers[2]] == list(
            range(N)
        )
        assert torch.equal(torch.cat(batches).permute(0, 2, 3, 1), torch.from_numpy(pixels))


def test_generated_samples_are_judged_as_they_would_be_saved() -> None:
    gray = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1)
    ((numbers, batch),) = Generated(gray, nn.Identity()).batches(8)
    assert numbers == list(range(5)) and batch.dtype == torch.uint8
    assert batch[:, :, 0, 0].tolist() == [[level] * 3 for level in (0, 0, 128, 255, 255)]


def test_a_broken_file_is_named_left_out_and_counted_once(tmp_path: Path) -> None:
    folder, said = write_folder(tmp_path / "set", pictures(0)), []
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:100])
    images = open_set(folder, None, said.append)
    for _ in range(2):
        assert [number for numbers, _ in images.batches(2) for number in numbers] == [0, 2, 3, 4]
    assert len(said) == 1 and "001.png" in said[0]
    for file in folder.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 5 pictures in .* can be read"):
        list(images.batches(2))


def test_pictures_of_several_sizes_are_refused_unless_they_are_cut(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pictures(0, 2))
    Image.fromarray(pictures(1, 1, 40)[0]).save(folder / "large.png")
    with pytest.raises(DataError, match=r"large\.png is 40 x 40 and those before it are 24 x 24; pass --size"):
        list(open_set(folder).batches(8))
    ((_, batch),) = open_set(folder, 16).batches(8)
    assert batch.shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 8, 8, 3)), r"arr_0 of .* is float64\[2, 8, 8, 3\]; it should be uint8\[N, H, W, 3\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"is uint8\[2, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"is uint8\[0, 8, 8, 3\]"),
    ],
)
def test_an_npz_of_other_arrays_is_refused(tmp_path: Path, array: Any, said: str) -> None:
    np.savez(tmp_path / "set.npz", arr_0=array)
    with pytest.raises(DataError, match=said):
        open_set(tmp_path / "set.npz")


def test_what_is_no_set_or_cut_short_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=pictures(0))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, said in {"other.npz": "cannot be read", "text.npz": "cannot be read", "empty": "no pictures"}.items():
        with pytest.raises(DataError, match=said):
            open_set(tmp_path / name)
    with pytest.raises(DataError, match="is no folder of pictures and no npz"):
        open_set(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["pictures", "statistics"])
def test_a_compressed_npz_that_is_damaged_anywhere_is_read_or_refused(
    inception: Inception, tmp_path: Path, kind: str
) -> None:
    """Read where zip files check nothing, such as times; these statistics are of other dimensions, so never."""
    file, refused = tmp_path / "set.npz", 0
    arrays = {"pictures": {"arr_0": pictures(0, 2, 6) // 64}, "statistics": {"mu": np.arange(40.0), "sigma": np.eye(8)}}
    np.savez_compressed(file, **arrays[kind])
    whole = file.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= (1, 255, 8)[at % 3]
        file.write_bytes(damaged)
        try:
            list(open_set(file).batches(2)) if kind == "pictures" else load_reference(file, inception)
        except DataError as error:
            refused += 1
            assert str(file) in str(error)
    assert refused == len(whole) if kind == "statistics" else refused > len(whole) / 2


def test_a_set_is_at_no_distance_from_itself_and_statistics_stand_for_pictures(
    inception: Inception, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "real", pictures(0))
    features = features_of(open_set(folder), inception)
    reference = load_reference(folder, inception)
    figures, notes = published_metrics(features, reference)
    scale = float(moments(features.pool)[1].trace())
    assert figures["fid"] == pytest.approx(0, abs=1e-5 * scale)  # roots of eigenvalues that rounding moved off 0
    assert (figures["inception_precision"], figures["inception_recall"]) == (1, 1)
    assert "kid" not in figures and any("kid is left out: it needs 1000" in note for note in notes)
    assert any(f"fid of {N} samples is mostly bias" in note and "2049" in note for note in notes)

    (mean, covariance), (mean_s, covariance_s) = (moments(x) for x in (features.pool, features.spatial))
    stored = {"mu": mean, "sigma": covariance, "mu_s": mean_s, "sigma_s": covariance_s}
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    other = features_of(open_set(write_folder(tmp_path / "other", pictures(1) // 2)), inception)
    wanted, _ = published_metrics(other, reference)
    assert wanted["fid"] > 0.01 * scale and wanted["sfid"] > 0
    np.savez(tmp_path / "statistics.npz", **arrays)
    got, notes = published_metrics(other, load_reference(tmp_path / "statistics.npz", inception))
    assert got == {name: wanted[name] for name in ("inception_score", "fid", "sfid")}
    assert any("kid, precision and recall are left out" in note for note in notes)
    np.savez(tmp_path / "both.npz", **arrays, arr_0=pictures(0))
    assert published_metrics(other, load_reference(tmp_path / "both.npz", inception))[0] == pytest.approx(wanted)


def test_a_reference_is_seen_once_until_it_changes(inception: Inception, tmp_path: Path) -> None:
    folder, seen = write_folder(tmp_path / "real", pictures(0, 2)), []
    load = lambda: load_reference(folder, inception, progress=lambda done, total: seen.append(done))  # noqa: E731
    first, again = load(), load()
    assert seen == [2] and torch.equal(first.moments[1], again.moments[1])
    Image.fromarray(pictures(5, 1)[0]).save(folder / "new.png")
    assert len(load().pool) == 3 and seen == [2, 3]
    for file in cache_folder().iterdir():
        os.truncate(file, 100)
    assert torch.equal(load().moments[0], load_reference(folder, inception).moments[0]) and seen == [2, 3, 3]


def test_statistics_of_other_dimensions_are_refused(inception: Inception, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(DataError, match=r"mu is \[768\] and sigma \[768, 768\], but Inception gives 2048 features"):
        load_reference(tmp_path / "a.npz", inception)
    np.savez(tmp_path / "b.npz", mu=np.zeros(POOL), sigma=np.eye(POOL), mu_s=np.zeros(9), sigma_s=np.eye(9))
    with pytest.raises(DataError, match=r"mu_s is \[9\].* gives 2023 features"):
        load_reference(tmp_path / "b.npz", inception)
    np.savez(tmp_path / "c.npz", mu=np.zeros(POOL))
    with pytest.raises(DataError, match=r"holds mu; a reference has mu and sigma"):
        load_reference(tmp_path / "c.npz", inception)


def test_weights_that_are_absent_broken_foreign_or_code_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match=r"not at .*w\.pth and cannot be fetched .* or pass --inception FILE"):
        _weights((tmp_path / "w.pth").as_uri())
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save(pytest.raises, tmp_path / "code.pth")
    for name in ("foreign", "broken", "code", "absent"):
        with pytest.raises(ModelError, match=f"{name}.pth cannot be read as Inception's weights .* download https"):
            Inception(tmp_path / f"{name}.pth")


def test_few_samples_are_refused_and_a_further_set_is_further() -> None:
    reference = reference_of(random_features(0, 900))
    with pytest.raises(DataError, match="3 samples are too few for any metric"):
        published_metrics(random_features(1, 3), reference)
    near, notes = published_metrics(random_features(1, 900), reference)
    assert any("kid is left out: it needs 1000 samples and real pictures, got 900 and 900" in note for note in notes)
    far, _ = published_metrics(random_features(1, 900, shift=1.0), reference)
    for name in ("fid", "sfid"):
        assert near[name] < far[name]
    assert far["fid"] == pytest.approx(8, rel=0.2)  # 8 features, each moved by 1; the means are good to 1/sqrt(900)
    for name in ("inception_precision", "inception_recall"):
        assert far[name] < near[name]
    blind, notes = published_metrics(random_features(1, 900), Reference("mu", reference.moments, None, None))
    assert blind == {name: near[name] for name in ("inception_score", "fid")}
    assert any("sfid is left out: mu holds no mu_s" in note for note in notes)


def test_kid_is_zero_between_two_samples_of_one_distribution() -> None:
    real = random_features(0, 1100).pool
    near, far = (kernel_inception_distance(random_features(1, 1100, by).pool, real, 3) for by in (0.0, 1.0))
    assert abs(near) < 0.05 * far  # unbiased; 1 000 samples leave a few thousandths of what moving all features makes


def test_inception_score_is_the_mean_over_splits() -> None:
    sure = 100 * torch.eye(10)[torch.arange(5000) % 10]
    one = 100 * torch.eye(10)[torch.zeros(5000, dtype=torch.long)]
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(torch.cat([sure, one])) == pytest.approx(5.5)  # over both at once it would be 6.3


def test_the_formulas_are_torch_fidelitys() -> None:
    """Where its other modules can be imported, which takes a torchvision that was built for the torch at hand."""
    pytest.importorskip("torchvision")
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    x, y = random_features(0, 1100), random_features(1, 1200, 0.3)
    figures, _ = published_metrics(x, reference_of(y))
    fid = fid_statistics_to_metric(*(fid_features_to_statistics(one.pool.double()) for one in (x, y)), False)
    prc = prc_features_to_metric(x.pool, y.pool, verbose=False)
    assert figures["fid"] == pytest.approx(fid[KEY_METRIC_FID], rel=1e-6)  # another root of the same product
    kid = kid_features_to_metric(x.pool, y.pool, verbose=False)[KEY_METRIC_KID_MEAN]
    assert kernel_inception_distance(x.pool, y.pool) == pytest.approx(1000 * kid, rel=1e-4)  # theirs is float32
    assert figures["inception_score"] == pytest.approx(isc_features_to_metric(x.logits, 1)[KEY_METRIC_ISC_MEAN])
    wanted = (prc[KEY_METRIC_PRECISION], prc[KEY_METRIC_RECALL])
    assert (figures["inception_precision"], figures["inception_recall"]) == pytest.approx(wanted)


def test_eval_judges_pictures_as_a_user_types_it(hcompress: Any, weights: Path, clip: Path, tmp_path: Path) -> None:
    real, made = write_folder(tmp_path / "real", pictures(0)), write_folder(tmp_path / "made", pictures(1))
    (made / "zz.jpg").write_bytes(b"no picture")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\nf\n")
    asked = ("--prompts", tmp_path / "prompts.txt", "--clip", clip)
    code, stdout, stderr = hcompress("eval", made, "--reference", real, "--inception", weights, *asked, "--json")
    figures = json.loads(stdout)
    assert code == 0 and (figures["num_samples"], figures["left_out"]) == (N, 1)
    assert {"fid", "sfid", "inception_score", "inception_precision", "clip_score"} <= figures.keys()
    assert stderr.count("zz.jpg cannot be read (UnidentifiedImageError): left out") == 1
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: m\ncaching: {{beta: 1}}\nmetrics: {{reference: {real}}}\n")
    code, stdout, _ = hcompress("eval", made, "--recipe", recipe, "--inception", weights)
    assert code == 0 and "sfid" in stdout
    assert "5 pictures, 1 left out" in " ".join(stdout.replace("│", " ").split())  # a long path wraps the title
    for wrong, said in {
        (): "is no MODEL, so it should hold pictures",
        ("--schedule", "s.safetensors", "--prompts", tmp_path / "prompts.txt"): "and have no schedule",
        ("--reference", tmp_path / "absent"): "no reference",
        ("--prompts", made / "000.png"): "cannot be read as a text file",
    }.items():
        code, _, stderr = hcompress("eval", made, *wrong)
        assert code == 1 and said in stderr and stderr.count("error: ") == 1


def test_eval_judges_a_model_with_and_without_a_schedule(
    hcompress: Any, weights: Path, tiny_run: Path, tmp_path: Path
) -> None:
    model, real = tiny_run.parent / "model", write_folder(tmp_path / "real", pictures(0, 4, 8))
    common = ("--reference", real, "--inception", weights, "--samples", 4, "--json")
    code, stdout, _ = hcompress("eval", model, "--steps", CALLS, "--cfg", CFG, *common)
    alone = json.loads(stdout)["uncached"]
    assert code == 0 and alone["cur"] == 0 and alone["fid"] > 0
    code, stdout, _ = hcompress("eval", model, "--schedule", tiny_run / "schedule.safetensors", *common)
    cached = json.loads(stdout)
    assert code == 0 and cached["uncached"] == pytest.approx(alone) and cached["fid"] != alone["fid"]


def test_eval_refuses_latents_that_nothing_decodes(hcompress: Any, weights: Path, tmp_path: Path) -> None:
    make_dit(channels=4).network.save_pretrained(tmp_path / "model" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "model" / "scheduler")
    real = write_folder(tmp_path / "real", pictures(0, 4, 8))
    code, _, told = hcompress("eval", tmp_path / "model", "--reference", real, "--inception", weights, "--samples", 4)
    assert code == 1 and told.splitlines()[-1].startswith("error: ") and "model/vae is missing" in told


def test_compare_opens_what_it_judges_by_before_anything_is_made(
    hcompress: Any, weights: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """So that nothing is sampled in vain: without the reference, without weights, and for latents without a VAE."""
    make_dit(channels=4).network.save_pretrained(tmp_path / "latent" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "latent" / "scheduler")
    real, rule = write_folder(tmp_path / "real", pictures(0, 4, 8)), "{method: random, target_cur: 0.4}"
    refused = {
        (tiny_run.parent / "model", tmp_path / "nowhere.npz", weights): "no reference",
        (tiny_run.parent / "model", real, tmp_path / "absent.pth"): "absent.pth cannot be read as Inception's weights",
        (tmp_path / "latent", real, weights): "vae is missing",
    }
    recipe = tmp_path / "rule.yaml"
    for number, ((model, reference, network), said) in enumerate(refused.items()):
        recipe.write_text(f"model: {model}\nsolver: {{steps: {CALLS}}}\ncaching: {rule}\n")
        given = ("--reference", reference, "--inception", network, "--samples", 4, "--out", tmp_path / f"{number}")
        code, _, stderr = hcompress("compare", recipe, *given)
        assert code == 1 and said in stderr and stderr.count("error: ") == 1
        assert not [file for file in (tmp_path / f"{number}").iterdir() if file.is_dir()]
    for flag, value in {"--size": 8, "--inception": weights}.items():
        code, _, stderr = hcompress("compare", recipe, flag, value, "--out", tmp_path / "none")
        assert code == 1 and stderr == f"error: {flag} would do nothing: there is no --reference\n"


def test_compare_tells_what_its_figures_are_against_and_what_they_lack(
    hcompress: Any, weights: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """In every row, so that a report written later, and of rows timed anew, says so too."""
    real, recipe = write_folder(tmp_path / "real", pictures(0, 4, 8)), tmp_path / "rule.yaml"
    settings = f"model: {tiny_run.parent / 'model'}\nsolver: {{steps: {CALLS}}}\ncaching: "
    measured = f"\nmetrics: {{samples: 4, reference: {real}}}\n"
    recipe.write_text(settings + "{method: random, target_cur: 0.4}" + measured)
    given = ("compare", recipe, "--inception", weights, "--size", 8, "--seeds", 0, "--out", tmp_path / "out", "--json")
    code, stdout, stderr = hcompress(*given)
    report = json.loads(stdout)
    ((group,), samples) = report["groups"], report["samples"]
    assert code == 0 and samples == 4 and len(group["rows"]) == 3
    few = f"fid of {samples} samples is mostly bias"
    for row in group["rows"]:
        assert row["figures"]["fid"]["mean"] > 0 and row["references"] == [f"{real}, cut to 8 pixels"]
        assert any(note.startswith(few) for note in row["notes"])
    for file in ("compare.md", "compare.html"):
        page = (tmp_path / "out" / file).read_text()
        assert few in page and f"compare with {real}, cut to 8 pixels." in page and "(random" not in page
    file = next((tmp_path / "out").rglob("random*/row-*.json"))
    row = json.loads(file.read_text())
    file.write_text(json.dumps(row | {"measured": row["measured"] | {"rounds": 77}}))
    code, stdout, stderr = hcompress(*given)
    assert code == 0 and "fid" not in stderr and json.loads(file.read_text())["notes"] == row["notes"]
