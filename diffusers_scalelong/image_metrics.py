"""FID, Inception Score, precision and recall of generated images, over the features of a chosen network."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch.utils.data import DataLoader, Dataset
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from tqdm.auto import tqdm

INCEPTION_SCORE_SPLITS = 10


class InceptionFeatures(torch.nn.Module):
    """The Inception-v3 of the published scores (weights of 2015-12-05, converted by torch-fidelity).

    Attributes:
        preprocess: an RGB image, uint8 (height, width, 3), to the network's input for it.
        num_features: 2,048, the last pooling layer.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: its weights are not on this machine and cannot be downloaded.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        alternative = (
            "Without them, --feature_extractor takes any Transformers vision model, a local folder included, such as "
            "a DINOv2, ViT or CLIP. Scores of different extractors are not comparable."
        )
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError as error:
            raise ImportError(
                f"--feature_extractor inception needs torch-fidelity ({error}): pip install torch-fidelity. It brings "
                f"torchvision, and on first use downloads Inception-v3's weights. {alternative}"
            ) from error
        url = inception.URL_INCEPTION_V3
        try:  # torch-fidelity would load the file without these two checks
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:  # from no network to a damaged file
            raise OSError(
                f"The weights of Inception-v3 cannot be loaded ({error}). Download {url} on a machine with a network "
                f"and put the file into {torch.hub.get_dir()}/checkpoints. {alternative}"
            ) from error
        self.network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        self.preprocess: Callable[[np.ndarray], torch.Tensor] = _channels_first

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features, float32 (batch, 2048), and the class logits, float32 (batch, 1008)."""
        return self.network(inputs)


class TransformersFeatures(torch.nn.Module):
    """Features from a vision model of Transformers, with the preprocessing of its `preprocessor_config.json`.

    A model that was saved with a head for image classification gives the head's input as features and its class
    logits. Any other gives its pooled output and no logits; of a model of images and texts, its vision part's.

    Args:
        name_or_path: the model, a local folder or a name on the Hub.
        cache_dir: where files from the Hub are kept.

    Attributes:
        preprocess: an RGB image, uint8 (height, width, 3), to the network's input for it.
        num_features: the width of the features.

    Raises:
        OSError: there is no such model or no preprocessor config, or they cannot be read.
        ValueError: the model has no pooled output, or some of its weights are missing and would be random.
    """

    def __init__(self, name_or_path: str, cache_dir: str | None = None) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

        options: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(name_or_path, **options)
            # Pillow resizes, whether torchvision is installed or not: one machine's scores are another's.
            processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", **options)
            classifies = any(name.endswith("ForImageClassification") for name in config.architectures or [])
            auto_model = AutoModelForImageClassification if classifies else AutoModel
            model, loading = auto_model.from_pretrained(name_or_path, output_loading_info=True, **options)
        except Exception as error:  # Transformers raises many kinds
            raise OSError(
                f"No feature extractor could be loaded from {name_or_path}: {error}\nIt must be a vision model of "
                "Transformers with a preprocessor_config.json, a local folder or a name on the Hub."
            ) from error
        if loading["missing_keys"]:
            raise ValueError(
                f"The feature extractor {name_or_path} lacks weights of its model, so its features would be random: "
                f"{', '.join(sorted(loading['missing_keys']))}. Choose another --feature_extractor."
            )
        self.model = getattr(model, "vision_model", model).float().eval().requires_grad_(False)
        self.preprocess: Callable[[np.ndarray], torch.Tensor] = partial(_pixel_values, processor)
        self._head_input: torch.Tensor | None = None
        if classifies:
            self.model = model
            heads = [
                m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == config.num_labels
            ]
            if not heads:
                raise ValueError(f"{name_or_path} has no linear classification head. Choose another model.")
            heads[-1].register_forward_pre_hook(self._keep_head_input)
        # One image through it all: an unsuitable model is found now and not after the sampling.
        features, _ = self(self.preprocess(np.zeros((32, 32, 3), np.uint8))[None])
        self.num_features: int = features.shape[1]

    def _keep_head_input(self, head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self._head_input = inputs[0]

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features, float32 (batch, num_features), and the class logits (batch, classes) or `None`."""
        outputs = self.model(inputs)
        if self._head_input is not None:
            return self._head_input.flatten(1), outputs.logits
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{type(self.model).__name__} has no pooled output: choose another --feature_extractor.")
        return pooled.flatten(1), None


def _channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _pixel_values(processor: Any, image: np.ndarray) -> torch.Tensor:
    return processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]


def load_feature_extractor(
    name_or_path: str, cache_dir: str | None = None
) -> InceptionFeatures | TransformersFeatures:
    """Loads `"inception"` or a vision model of Transformers, for evaluation, on the CPU.

    Args:
        name_or_path: `"inception"`, a local folder or a name on the Hub.
        cache_dir: where files from the Hub are kept.

    Raises:
        ImportError, OSError, ValueError: as the two classes.
    """
    if name_or_path == "inception":
        return InceptionFeatures()
    return TransformersFeatures(name_or_path, cache_dir)


class _Inputs(Dataset):
    """Images as inputs of a feature extractor."""

    def __init__(self, images: Dataset, preprocess: Callable[[np.ndarray], torch.Tensor]) -> None:
        self.images = images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(self.images[index])


def extract_features(
    extractor: InceptionFeatures | TransformersFeatures,
    images: Dataset,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
    desc: str = "Features",
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The features of all images, batch by batch, in order for any number of processes. Every process must call.

    Args:
        extractor: on the accelerator's device.
        images: of known length; gives RGB images, uint8 (height, width, 3).
        accelerator: splits the batches over the processes; each of them gets the features of all.
        batch_size: of one process.
        num_workers: processes that load images.
        desc: of the progress bar.
    """
    loader = accelerator.prepare(
        DataLoader(_Inputs(images, extractor.preprocess), batch_size=batch_size, num_workers=num_workers)
    )
    for inputs in tqdm(loader, desc=desc, unit="batch", disable=not accelerator.is_main_process):
        outputs = [output for output in extractor(inputs) if output is not None]
        features, *logits = accelerator.gather_for_metrics(outputs)
        yield features, logits[0] if logits else None


class ImageMetrics:
    """Compares generated with real images, both given as features, batch by batch.

    FID (Heusel et al. 2017) and Inception Score (Salimans et al. 2016, 10 splits) are those of torchmetrics, in
    float64. Precision and recall (Kynkäänniemi et al. 2019) are `precision_recall`'s; for them the features of all
    images are kept, 4 bytes each.

    Args:
        num_features: the features' width.
        num_neighbours: k of precision and recall.
    """

    def __init__(self, num_features: int, num_neighbours: int = 3) -> None:
        self.num_features = num_features
        self.num_neighbours = num_neighbours
        # The metrics get features, and leave them as they are. One process computes: nothing to synchronise.
        identity = torch.nn.Identity()
        identity.num_features = num_features  # type: ignore[assignment]
        self._fid = FrechetInceptionDistance(feature=identity, sync_on_compute=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all")
            self._inception_score = InceptionScore(identity, INCEPTION_SCORE_SPLITS, sync_on_compute=False)
        self._features: dict[bool, list[np.ndarray]] = {True: [], False: []}
        self._has_logits = False

    def update(self, features: torch.Tensor, logits: torch.Tensor | None, real: bool) -> None:
        """Adds a batch.

        Args:
            features: (batch, num_features).
            logits: of the classes, (batch, classes), or `None`: then there will be no Inception Score.
            real: whether the images are real or generated.

        Raises:
            ValueError: a feature is not finite.
        """
        features = features.cpu()
        if not features.isfinite().all():
            raise ValueError("The feature extractor gave values that are not finite. Choose another.")
        self._fid.update(features.double(), real=real)
        self._features[real].append(features.numpy())
        if logits is not None and not real:
            self._inception_score.update(logits.cpu().double())
            self._has_logits = True

    def compute(self, seed: int = 0) -> dict[str, float]:
        """The scores of all batches so far.

        Args:
            seed: of the images' order, in which the Inception Score splits them.

        Returns:
            `"fid"`, `"precision"`, `"recall"` and, where there were logits, `"inception_score"` and
            `"inception_score_std"`, mean and standard deviation over the splits.

        Raises:
            ValueError: fewer than `num_neighbours + 1` real or generated images.
        """
        real, generated = (np.concatenate(self._features[kind] or [np.empty((0, 1))]) for kind in (True, False))
        precision, recall = precision_recall(real, generated, self.num_neighbours)
        scores = {"fid": float(self._fid.compute()), "precision": precision, "recall": recall}
        if self._has_logits:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                mean, std = self._inception_score.compute()
            scores |= {"inception_score": float(mean), "inception_score_std": float(std)}
        return scores

    def notes(self) -> list[str]:
        """What to know of the scores: sentences about those that are unreliable or not available."""
        notes = []
        for real, kind in ((False, "generated"), (True, "real")):
            number = sum(map(len, self._features[real]))
            if number <= self.num_features:
                notes.append(
                    f"FID is unreliable: {number} {kind} images are too few for features of {self.num_features} "
                    "dimensions, whose covariance matrix is then singular. Take several times as many."
                )
        if not self._has_logits:
            notes.append(
                "Inception Score is not available: it needs class probabilities, and the feature extractor has no "
                "classification head."
            )
        return notes


def precision_recall(real: np.ndarray, generated: np.ndarray, num_neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is the union of balls around its points, each as wide as the distance to the point's k-th nearest
    neighbour in the set. Precision is the part of the generated points in the real manifold, recall the part of the
    real points in the generated one.

    Args:
        real: features, (number, width).
        generated: features, (number, width).
        num_neighbours: k.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: a set has fewer than k + 1 points.
    """
    for name, points in (("real", real), ("generated", generated)):
        if len(points) <= num_neighbours:
            raise ValueError(
                f"Precision and recall with k = {num_neighbours} need at least {num_neighbours + 1} {name} images, "
                f"but there are {len(points)}."
            )
    real_radii, generated_radii = (_radii(points, num_neighbours) for points in (real, generated))
    num_precise, recalled, start = 0, np.zeros(len(real), bool), 0
    for distances in pairwise_distances_chunked(generated, real):  # some rows at a time
        num_precise += int((distances <= real_radii).any(axis=1).sum())
        recalled |= (distances <= generated_radii[start : start + len(distances), None]).any(axis=0)
        start += len(distances)
    return num_precise / len(generated), float(recalled.mean())


def _radii(points: np.ndarray, num_neighbours: int) -> np.ndarray:
    neighbours = NearestNeighbors(n_neighbors=num_neighbours, algorithm="brute").fit(points)
    return neighbours.kneighbors()[0][:, -1]  # a point is not its own neighbour here
