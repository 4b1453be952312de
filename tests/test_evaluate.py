"""The metrics against independent computations, and the evaluation script on real pipelines, data and processes."""

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import sklearn
import torch
import transformers
from datasets import Dataset
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from huggingface_hub import ModelCard
from images import truncate, write_images
from PIL import Image
from scripts import ENVIRONMENT, ROOT, TINY_UNET, TINY_UVIT, launch, load_script, start
from text_pipelines import write_stable_diffusion

from diffusers_scalelong import (
    ScaleLongPipeline,
    ScaleLongUNet2DModel,
    ScaleLongUViT2DModel,
)
from diffusers_scalelong.image_data import load_images
from diffusers_scalelong.image_metrics import ImageMetrics, load_feature_extractor, precision_recall

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
PREPROCESSING = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
}


def frechet_distance(first, second):
    """With SciPy's matrix square root, from the samples."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real)


def covered(points, manifold, k):
    """The part of `points` inside a ball around a point of `manifold`, one by one."""
    points, manifold = np.asarray(points, np.float64), np.asarray(manifold, np.float64)
    radii = [np.sort(np.linalg.norm(manifold - center, axis=1))[k] for center in manifold]  # the 0th is itself
    inside = [(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points]
    return np.mean(inside)


# ---- Metrics


def metrics_of(real, generated, logits=None, batch_size=7):
    metrics = ImageMetrics(num_features=real.shape[1])
    for is_real, features in ((True, real), (False, generated)):
        for first in range(0, len(features), batch_size):
            batch = slice(first, first + batch_size)
            batch_logits = None if logits is None else logits[batch]
            metrics.update(torch.as_tensor(features[batch]), batch_logits, is_real)
    return metrics.compute()


def test_fid_of_two_gaussians_in_closed_form():
    random = np.random.default_rng(0)
    white = random.standard_normal((200, 5))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T  # mean 0, covariance 1: exactly
    widths, shift = np.array([0.5, 1, 2, 3, 4]), np.array([1, 0, -2, 0, 0.5])
    metrics = metrics_of(white, white * widths + shift)
    assert metrics["fid"] == pytest.approx((shift**2).sum() + ((widths - 1) ** 2).sum(), rel=1e-9)


def test_fid_of_correlated_features_equals_scipys():
    random = np.random.default_rng(1)
    real = random.standard_normal((60, 8)) @ random.standard_normal((8, 8)) + 3
    generated = random.standard_normal((50, 8)) @ random.standard_normal((8, 8))
    assert metrics_of(real, generated)["fid"] == pytest.approx(frechet_distance(real, generated), rel=1e-8)


def test_equal_sets_score_perfectly():
    features = np.random.default_rng(2).standard_normal((40, 6)).astype(np.float32)
    metrics = metrics_of(features, features.copy())
    assert metrics["fid"] == pytest.approx(0, abs=1e-9)
    assert (metrics["precision"], metrics["recall"]) == (1, 1)
    assert sorted(metrics) == ["fid", "precision", "recall"]


def test_inception_score_of_certain_predictions_by_hand():
    # 20 images in 10 splits of 2, two classes: a split scores 2 where its images differ and 1 where they do not.
    logits = torch.tensor([[50.0, 0.0]] * 10 + [[0.0, 50.0]] * 10)
    features = np.random.default_rng(0).standard_normal((20, 2))
    metrics = metrics_of(features, features, logits)
    num_mixed = round(10 * (metrics["inception_score"] - 1))
    assert 0 < num_mixed < 10
    splits = [2] * num_mixed + [1] * (10 - num_mixed)
    assert metrics["inception_score"] == pytest.approx(np.mean(splits), rel=1e-9)
    assert metrics["inception_score_std"] == pytest.approx(np.std(splits, ddof=1), rel=1e-9)


def test_inception_score_of_uncertain_predictions():
    logits = torch.randn(100, 7, generator=torch.Generator().manual_seed(0)) * 3
    features = np.random.default_rng(0).standard_normal((100, 2))
    torch.manual_seed(123)
    metrics = metrics_of(features, features, logits)
    assert torch.randint(1000, (1,)).item() == torch.randint(1000, (1,), generator=torch.manual_seed(123)).item()

    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).numpy()
    exponentials = np.exp(logits.double().numpy()[order])
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    scores = []
    for p in probabilities.reshape(10, 10, 7):
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert metrics["inception_score"] == pytest.approx(np.mean(scores), rel=1e-9)
    assert metrics["inception_score_std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_a_search_one_by_one(k):
    random = np.random.default_rng(3)
    real = random.standard_normal((90, 3)).astype(np.float32)
    generated = (0.6 * random.standard_normal((110, 3)) + 0.8).astype(np.float32)
    expected = covered(generated, real, k), covered(real, generated, k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)
    with sklearn.config_context(working_memory=0.01):  # MiB: in many pieces
        assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_by_hand():
    line = np.arange(5.0)[:, None]
    # With k = 1 the real balls have radius 1, and 5.5 lies outside of them. The generated radii are 0.5, 0.5 and 4.5:
    # 0 lies in the ball of 0.5, 1 in that of 1, and 2, 3 and 4 in that of 5.5.
    generated = np.array([[0.5], [1.0], [5.5]])
    assert precision_recall(line, generated, 1) == (pytest.approx(2 / 3), 1)
    assert precision_recall(line, generated + 100, 1) == (0, 0)


def test_unusable_features_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        ImageMetrics(2).update(torch.tensor([[1.0, torch.nan]]), None, real=True)
    with pytest.raises(ValueError, match="at least 4 generated images, but there are 3"):
        metrics_of(np.zeros((4, 2)), np.zeros((3, 2)))


# ---- Feature extractors


def save_extractor(model, folder, processor="ViTImageProcessor", **preprocessing):
    model.save_pretrained(folder)
    config = {"image_processor_type": processor, **PREPROCESSING, **preprocessing}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small classifier; its weights are large enough to tell images apart."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return save_extractor(model, tmp_path_factory.mktemp("extractor") / "vit")


def prepared_by_hand(image):
    resized = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
    normalised = (resized - PREPROCESSING["image_mean"]) / PREPROCESSING["image_std"]
    return torch.from_numpy(normalised.transpose(2, 0, 1)).float()


def vit_features_by_hand(folder, images):
    """Of RGB images: what the head sees (the class token after the last norm) and the logits."""
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    inputs = torch.stack([prepared_by_hand(image) for image in images])
    with torch.no_grad():
        return model.vit(inputs).last_hidden_state[:, 0], model(inputs).logits


def random_images(number, size=9):
    return np.random.default_rng(0).integers(256, size=(number, size, size, 3), dtype=np.uint8)


def extract(folder, images):
    extractor = load_feature_extractor(str(folder))
    features, logits = extractor(torch.stack([extractor.preprocess(image) for image in images]))
    assert features.shape == (len(images), extractor.num_features)
    return features, logits


def test_a_classifier_gives_what_its_head_sees_and_its_logits(vit):
    images = random_images(3)
    features, logits = extract(vit, images)
    expected_features, expected_logits = vit_features_by_hand(vit, images)
    torch.testing.assert_close(features, expected_features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert features.std(0).max() > 0.01


def dinov2():
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**{**VIT, "intermediate_size": None})
    ), "BitImageProcessor"


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config), "ConvNextImageProcessor"


def clip():
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8)
    return transformers.CLIPModel(config), "CLIPImageProcessor"


@pytest.mark.parametrize("make", [dinov2, resnet, clip])
def test_any_other_vision_model_gives_its_pooled_output(tmp_path, make):
    torch.manual_seed(0)
    model, processor = make()
    crop = {"crop_pct": 1.0, "size": {"shortest_edge": 16}} if make is resnet else {}
    folder = save_extractor(model, tmp_path / "model", processor, **crop)
    images = random_images(3)
    features, logits = extract(folder, images)
    assert logits is None
    with torch.no_grad():
        vision = getattr(model.eval(), "vision_model", model)
        expected = vision(torch.stack([prepared_by_hand(image) for image in images])).pooler_output.flatten(1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_unsuitable_extractors_are_refused(tmp_path):
    no_pooler = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)
    with pytest.raises(ValueError, match=r"lacks weights .* random: pooler\.dense\.bias, pooler\.dense\.weight"):
        load_feature_extractor(str(save_extractor(no_pooler, tmp_path / "no_pooler")))
    autoencoder = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT))
    with pytest.raises(ValueError, match="ViTMAEModel has no pooled output"):
        load_feature_extractor(str(save_extractor(autoencoder, tmp_path / "autoencoder")))
    no_pooler.save_pretrained(tmp_path / "no_config")
    for folder in (tmp_path / "no_config", tmp_path / "absent"):
        with pytest.raises(
            OSError, match=rf"No feature extractor could be loaded from {folder}[\s\S]*preprocessor_conf"
        ):
            load_feature_extractor(str(folder))


def test_without_torch_fidelity_the_message_names_the_alternative(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install torch-fidelity\.[\s\S]*any Transformers vision model"):
        load_feature_extractor("inception")


@pytest.mark.parametrize("fault", ["unreachable", "damaged"])
def test_inception_weights_that_cannot_be_had_are_named(tmp_path, monkeypatch, fault):
    # torch-fidelity needs torchvision, so only the address of the weights is stood in for; the download is real.
    name = "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / name).write_bytes(b"not these weights")
    url = f"http://127.0.0.1:9/{name}" if fault == "unreachable" else (tmp_path / name).as_uri()
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    package.feature_extractor_inceptionv3, module.URL_INCEPTION_V3 = module, url
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(
        OSError, match=rf"Download {url} on a machine with a network .*{tmp_path}/torch/hub/checkpoints"
    ):
        load_feature_extractor("inception")
    assert not list(tmp_path.glob("torch/hub/checkpoints/*"))  # a damaged file is not kept


# ---- The script


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def pipeline_dir(tmp_path_factory):
    torch.manual_seed(0)
    unet = ScaleLongUNet2DModel.from_config(TINY_UNET, skip_scaling="cs")
    folder = tmp_path_factory.mktemp("pipelines") / "ddpm"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    return folder


def flags(pipeline, vit, output_dir, *more):
    return [
        *("--pretrained_model_name_or_path", pipeline, "--feature_extractor", vit, "--output_dir", output_dir),
        *("--dataset_name", "digits", "--max_train_samples", 300, "--num_images", 42, "--batch_size", 4),
        *("--num_inference_steps", 40, *more),
    ]


def evaluate(*arguments):
    start("evaluate.py", *arguments)


def pngs(output_dir):
    return {path.name: path.read_bytes() for path in (output_dir / "images").iterdir()}


def pixels(output_dir):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((output_dir / "images").glob("*.png"))])


def report(output_dir):
    return json.loads((output_dir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pipeline_dir, vit):
    """A run in one process, and what it printed: stdout, stderr."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluate(*flags(pipeline_dir, vit, output_dir))
    return output_dir, out.getvalue(), err.getvalue()


def test_a_run_reports_what_its_images_score(finished, vit, pipeline_dir):
    output_dir, out, err = finished
    assert sorted(pngs(output_dir)) == [f"{index:06d}.png" for index in range(42)]
    generated = pixels(output_dir)
    assert generated.shape == (42, 8, 8)
    assert len({image.tobytes() for image in generated}) == 42

    # From the pictures to the scores by other means.
    real = np.stack([np.asarray(image) for image in load_images("digits", max_train_samples=300)["image"]])
    features, logits = {}, {}
    for name, images in (("real", real), ("generated", generated)):
        rgb = images[..., None].repeat(3, axis=-1)
        features[name], logits[name] = (x.numpy() for x in vit_features_by_hand(vit, rgb))
    written = report(output_dir)
    scores = written["metrics"]
    assert scores["fid"] == pytest.approx(frechet_distance(features["real"], features["generated"]), rel=1e-4)
    assert scores["precision"] == pytest.approx(covered(features["generated"], features["real"], 3), abs=1e-9)
    assert scores["recall"] == pytest.approx(covered(features["real"], features["generated"], 3), abs=1e-3)
    exponentials = np.exp(logits["generated"].astype(np.float64))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    order = torch.randperm(42, generator=torch.Generator().manual_seed(0)).numpy()
    splits = [probabilities[indices] for indices in torch.from_numpy(order).chunk(10)]
    expected = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in splits]
    assert scores["inception_score"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert scores["inception_score_std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-3)

    assert written["notes"] == []
    assert (written["num_images"], written["num_real_images"], written["num_features"]) == (42, 300, 16)
    assert (written["dataset"], written["resolution"], written["sampling"]["seed"]) == ("digits", 8, 0)
    assert written["pretrained_model_name_or_path"] == str(pipeline_dir)
    assert written["feature_extractor"] == str(vit)
    assert f"evaluate.py --pretrained_model_name_or_path {pipeline_dir}" in written["command"]
    assert written["versions"]["torch"] == torch.__version__
    assert {name: f"{score:.4f}" for name, score in scores.items()}.items() <= dict(
        re.findall(r"(\w+) +(\S+)", out)
    ).items()
    assert "42/42" in err
    grid = np.asarray(Image.open(output_dir / "grid.png"))
    assert (grid[2:66, 2:66] == generated[0].repeat(8, axis=0).repeat(8, axis=1)[..., None]).all()


def test_two_processes_generate_the_same_images_and_scores(tmp_path, finished, pipeline_dir, vit):
    launch("evaluate.py", *flags(pipeline_dir, vit, tmp_path / "run"), num_processes=2)
    assert pngs(tmp_path / "run") == pngs(finished[0])
    scores = report(finished[0])["metrics"]
    assert report(tmp_path / "run")["metrics"] == pytest.approx(scores, rel=1e-6)


def test_a_killed_run_leaves_whole_images_and_continues_with_the_missing_ones(tmp_path, finished, pipeline_dir, vit):
    output_dir = tmp_path / "run"
    command = [sys.executable, ROOT / "training" / "evaluate.py", *flags(pipeline_dir, vit, output_dir)]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    while not list(output_dir.glob("images/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output_dir / "metrics.json").exists()
    complete = pngs(finished[0])
    kept = {name: image for name, image in pngs(output_dir).items() if name.endswith(".png") and name[0] != "."}
    assert 0 < len(kept) < 42
    assert all(complete[name] == image for name, image in kept.items())

    # A kill in the middle of a write leaves this; and one image of a finished batch is gone.
    (output_dir / "images" / ".000041.png.partial").write_bytes(complete["000041.png"][:20])
    (output_dir / "images" / "000001.png").unlink(missing_ok=True)
    kept.pop("000001.png", None)
    times = {name: (output_dir / "images" / name).stat().st_mtime_ns for name in kept}
    evaluate(*flags(pipeline_dir, vit, output_dir))
    assert pngs(output_dir) == complete
    assert {name: (output_dir / "images" / name).stat().st_mtime_ns for name in kept} == times
    assert report(output_dir)["metrics"] == pytest.approx(report(finished[0])["metrics"], rel=1e-6)


def test_finished_images_are_measured_again_and_not_generated_again(finished, pipeline_dir, vit, tmp_path):
    """Fewer images, other features, a part of the real images: only the metrics change."""
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    os.symlink(finished[0] / "images", output_dir / "images")
    (output_dir / "sampling.json").write_bytes((finished[0] / "sampling.json").read_bytes())
    before = {path: path.stat().st_mtime_ns for path in (finished[0] / "images").iterdir()}
    torch.manual_seed(0)
    headless = save_extractor(transformers.ViTModel(transformers.ViTConfig(**VIT)), tmp_path / "headless")
    evaluate(*flags(pipeline_dir, headless, output_dir, "--num_images", 10, "--max_train_samples", 16))
    assert {path: path.stat().st_mtime_ns for path in (finished[0] / "images").iterdir()} == before
    written = report(output_dir)
    assert (written["num_images"], written["num_real_images"]) == (10, 16)
    assert sorted(written["metrics"]) == ["fid", "precision", "recall"]
    notes = " ".join(written["notes"])
    assert "10 generated images are too few for features of 16 dimensions" in notes
    assert "16 real images are too few for features of 16 dimensions" in notes
    assert "Inception Score is not available" in notes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", 1], "seed"),
        (["--num_inference_steps", 41], "num_inference_steps"),
        ("scheduler", "scheduler"),
        ("weights", "weights"),
        ("kappa", "weights"),
    ],
    ids=str,
)
def test_a_folder_of_other_images_is_refused(tmp_path, finished, pipeline_dir, vit, change, named):
    pipeline, more = pipeline_dir, []
    if isinstance(change, list):
        more = change
    else:
        other = DiffusionPipeline.from_pretrained(pipeline_dir)
        if change == "kappa":
            other.unet.set_kappa(0.8)
        elif change == "scheduler":
            other.scheduler = DDIMScheduler.from_config(other.scheduler.config)
        else:
            other.unet.conv_out.bias.data.add_(1e-3)
        pipeline = tmp_path / "other"
        other.save_pretrained(pipeline)
    before = pngs(finished[0])
    with pytest.raises(ValueError, match=rf"generated differently: {named}\. Continue them with .* --output_dir"):
        evaluate(*flags(pipeline, vit, finished[0], *more))
    assert pngs(finished[0]) == before


def test_a_moved_pipeline_and_another_batch_size_continue(tmp_path, pipeline_dir, vit, finished):
    moved = tmp_path / "moved"
    DiffusionPipeline.from_pretrained(pipeline_dir).save_pretrained(moved)
    output_dir = tmp_path / "run"
    evaluate(*flags(moved, vit, output_dir, "--num_images", 4))
    evaluate(*flags(pipeline_dir, vit, output_dir, "--num_images", 14, "--batch_size", 5))
    assert len(pngs(output_dir)) == 14
    difference = pixels(output_dir).astype(int) - pixels(finished[0])[:14]
    assert abs(difference).max() <= 1  # in another batch, images are alike up to rounding


def test_the_documents_snippet_puts_the_scores_on_a_model_card(tmp_path, monkeypatch, pipeline_dir, finished):
    shutil.copytree(pipeline_dir, tmp_path / "outputs" / "run")
    os.symlink(finished[0], tmp_path / "outputs" / "evaluation")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?save_model_card.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.S)
    exec(snippet, {})
    card = ModelCard.load(tmp_path / "outputs" / "run" / "README.md")
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == report(finished[0])["metrics"]


@pytest.mark.parametrize(("guidance_scale", "num_classes"), [(None, None), (2.0, None), (2.0, 3)])
def test_classes_are_spread_evenly_and_the_null_class_is_left_out(tmp_path, vit, guidance_scale, num_classes):
    torch.manual_seed(0)
    unet = ScaleLongUViT2DModel.from_config({**TINY_UVIT, "num_class_embeds": 11}, skip_scaling="cs")
    ScaleLongPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    seen = []
    call = ScaleLongPipeline.__call__

    def observed(self, *args, **kwargs):
        seen.append((kwargs["class_labels"], kwargs.get("guidance_scale")))
        return call(self, *args, **kwargs)

    more = ["--num_images", 24, "--batch_size", 16, "--num_inference_steps", 2]
    more += ["--guidance_scale", guidance_scale] if guidance_scale else []
    more += ["--num_classes", num_classes] if num_classes else []
    with pytest.MonkeyPatch.context() as patch:
        observed.__signature__ = inspect.signature(call)
        patch.setattr(ScaleLongPipeline, "__call__", observed)
        evaluate(*flags(tmp_path / "pipeline", vit, tmp_path / "run", *more))
    count = num_classes or 10  # eleven embeddings, ten digits
    assert [label for labels, _ in seen for label in labels] == [index % count for index in range(24)]
    assert {scale for _, scale in seen} == {guidance_scale or 1.0}
    assert report(tmp_path / "run")["sampling"]["class_labels"]["number"] == count


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "text"
    pipeline = write_stable_diffusion(folder)
    with torch.no_grad():  # so that the prompt shows in the picture
        for module in (pipeline.unet, pipeline.text_encoder):
            for parameter in module.parameters():
                parameter.mul_(2)
    pipeline.save_pretrained(folder)
    return folder


def captioned(folder, captions, column="text"):
    images = [Image.fromarray(image) for image in random_images(len(captions), size=20)]
    folder.mkdir()
    Dataset.from_dict({"image": images, column: captions}).to_parquet(folder / "train.parquet")
    return folder


def test_prompts_come_from_the_captions(tmp_path, vit, stable_diffusion):
    data = captioned(tmp_path / "data", [["a red cat", "a cat"], ["a blue dog"], ["blue"], ["red"], ["cat"]])
    more = ["--dataset_name", data, "--num_images", 7, "--num_inference_steps", 2, "--guidance_scale", 5]
    more += ["--cache_dir", tmp_path / "cache", "--resolution", 24]
    evaluate(*flags(stable_diffusion, vit, tmp_path / "run", *more))
    generated = pixels(tmp_path / "run")
    assert generated.shape == (7, 24, 24, 3)
    assert report(tmp_path / "run")["resolution"] == 24

    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    pipeline.set_progress_bar_config(disable=True)

    def by_hand(index, prompt):
        seed = np.random.SeedSequence((0, index)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        settings = {"height": 24, "width": 24, "num_inference_steps": 2, "guidance_scale": 5}
        return pipeline(prompt, **settings, generator=generator, output_type="np").images[0] * 255

    # Five rows for seven images: the prompts start again, with other noise.
    for index, prompt in ((0, "a red cat"), (1, "a blue dog"), (6, "a blue dog")):
        assert abs(generated[index] - by_hand(index, prompt)).max() < 1.5
        assert abs(generated[index] - by_hand(index, "red")).max() > 3

    other = captioned(tmp_path / "other", ["a red cat", "a dog", "blue", "red", "cat"])
    with pytest.raises(ValueError, match=r"generated differently: prompt\."):
        evaluate(*flags(stable_diffusion, vit, tmp_path / "run", *more, "--dataset_name", other))


def test_bf16_images_differ_a_little(tmp_path, finished, pipeline_dir, vit):
    evaluate(*flags(pipeline_dir, vit, tmp_path / "run", "--num_images", 4, "--mixed_precision", "bf16"))
    difference = abs(pixels(tmp_path / "run").astype(int) - pixels(finished[0])[:4])
    assert 0 < difference.max() < 40


BAD = {
    "one image": (["--num_images", 1], ValueError, "--num_images must be at least 4"),
    "no batch": (["--batch_size", 0], ValueError, "--batch_size must be at least 1"),
    "negative seed": (["--seed", -1], ValueError, "--seed must be at least 0"),
    "no pipeline": (
        ["--pretrained_model_name_or_path", "absent/folder"],
        OSError,
        "No pipeline could be loaded from ab",
    ),
    "too many steps": (["--num_inference_steps", 101], ValueError, "exceeds the 100 of the training"),
    "guidance": (
        ["--guidance_scale", 3],
        ValueError,
        "A DDPMPipeline takes no `guidance_scale`: leave --guidance_scale out",
    ),
    "classes": (["--num_classes", 3], ValueError, "--num_classes is for class-conditional"),
    "resolution": (["--resolution", 16], ValueError, "A DDPMPipeline takes no `height`: leave --resolution out"),
    "no column": (["--image_column", "img"], ValueError, "no column 'img'. Choose one of image, label"),
    "few real images": (["--max_train_samples", 3], ValueError, "There are 3 real images.*at least 4"),
    "no extractor": (
        ["--feature_extractor", "absent/folder"],
        OSError,
        "No feature extractor could be loaded from ab",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_sampled(tmp_path, pipeline_dir, vit, case):
    more, error, message = BAD[case]
    with pytest.raises(error, match=message):
        evaluate(*flags(pipeline_dir, vit, tmp_path / "run", *more))
    assert not (tmp_path / "run" / "images").exists()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB")])
def test_real_images_are_made_like_the_generated_ones(channels, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 20, 3), dtype=np.uint8))
    dataset = Dataset.from_dict({"photo": [image], "text": ["red"]})
    real_images = load_script("evaluate.py").RealImages(dataset, "photo", 8, channels)
    expected = image.convert(mode).resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8)).convert("RGB")
    assert len(real_images) == 1
    assert (real_images[0] == np.asarray(expected)).all()


def test_the_pipelines_own_number_of_steps_is_at_most_that_of_the_training(tmp_path, vit):
    unet = ScaleLongUNet2DModel.from_config(TINY_UNET, skip_scaling="cs")
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=3)).save_pretrained(tmp_path / "pipeline")
    settings = [str(flag) for flag in flags(tmp_path / "pipeline", vit, tmp_path / "run", "--num_images", 4)]
    index = settings.index("--num_inference_steps")
    evaluate(*settings[:index], *settings[index + 2 :])
    assert report(tmp_path / "run")["sampling"]["num_inference_steps"] == 3


def test_unfit_pipelines_and_captions_are_refused(tmp_path, vit, stable_diffusion):
    unet = ScaleLongUNet2DModel.from_config({**TINY_UNET, "num_class_embeds": 5}, skip_scaling="cs")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="a DDPMPipeline gives it no labels: use ScaleLongPipeline"):
        evaluate(*flags(tmp_path / "classes", vit, tmp_path / "run"))
    cache = ["--cache_dir", tmp_path / "cache", "--num_inference_steps", 2]
    data = captioned(tmp_path / "data", ["red"] * 5, column="caption")
    with pytest.raises(ValueError, match=r"no column 'text'\. Choose one of image, caption with --caption_column"):
        evaluate(*flags(stable_diffusion, vit, tmp_path / "run", *cache, "--dataset_name", data))
    data = captioned(tmp_path / "empty", ["red", "cat", None, "dog"])
    with pytest.raises(ValueError, match="row 2 has None"):
        evaluate(*flags(stable_diffusion, vit, tmp_path / "run", *cache, "--dataset_name", data))
    assert not (tmp_path / "run" / "images").exists()


def test_unfit_folders_are_refused(tmp_path, pipeline_dir, vit):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be created"):
        evaluate(*flags(pipeline_dir, vit, tmp_path / "file" / "run"))
    write_images(tmp_path / "photos" / "images", 2)
    with pytest.raises(OSError, match=r"no sampling\.json says how they were made"):
        evaluate(*flags(pipeline_dir, vit, tmp_path / "photos"))
    (tmp_path / "photos" / "sampling.json").write_text("{")
    with pytest.raises(OSError, match=r"sampling\.json is damaged"):
        evaluate(*flags(pipeline_dir, vit, tmp_path / "photos"))


def test_images_that_cannot_be_read_are_named(tmp_path, pipeline_dir, vit):
    paths = write_images(tmp_path / "data", 6)
    truncate(paths[2])
    more = ["--train_data_dir", tmp_path / "data", "--cache_dir", tmp_path / "cache", "--num_images", 5]
    settings = flags(pipeline_dir, vit, tmp_path / "run", *more)
    settings.remove("--dataset_name"), settings.remove("digits")
    with pytest.raises(OSError, match=r"2\.png"):
        evaluate(*settings)
    evaluate(*settings, "--skip_bad_images", "--dataloader_num_workers", 1)
    assert report(tmp_path / "run")["num_real_images"] == 5
    truncate(tmp_path / "run" / "images" / "000003.png")
    with pytest.raises(OSError, match=r"000003\.png cannot be read.*Remove it and repeat"):
        evaluate(*settings, "--skip_bad_images")


def test_samples_that_are_not_finite_stop_the_run(tmp_path, pipeline_dir, vit):
    broken = DiffusionPipeline.from_pretrained(pipeline_dir)
    broken.unet.conv_out.bias.data.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="Images 0 to 3 hold values that are not finite"):
        evaluate(*flags(tmp_path / "broken", vit, tmp_path / "run"))
    assert not pngs(tmp_path / "run")
