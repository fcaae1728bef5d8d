"""GenEval on photographs: Mask2Former finds the objects, CLIP tells their colors, and GenEval's rules judge.

The detector is the published script's (``djghosh13/geneval``): Mask2Former with Swin-S, trained on COCO's 80 classes
(Cheng et al. 2022, arXiv 2112.01527), here transformers' class with ``facebook/mask2former-swin-small-coco-instance``
(MIT licence). Shorter side to 800 px. The 100 likeliest pairs of query and class count; their confidence is the
probability of the class times the mean probability of the mask's pixels, and their box encloses the mask.
Colors: CLIP ViT-L/14 on the object before gray (``#999999``), cut out at its box, against three texts per color.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1], ``Q`` queries, ``K`` classes, masks ``(H, W)``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image

from noisear_rl.denoisers.placement import resolve_device
from noisear_rl.denoisers.quiet import quietly
from noisear_rl.images import to_uint8
from noisear_rl.rewards.clip import CLIPScore
from noisear_rl.rewards.geneval import COLORS, Detection, Verdict, judge, kept_objects
from noisear_rl.rewards.pretrained import check_images
from noisear_rl.rewards.weights import find_weights, read_state_dict

SOURCE = "facebook/mask2former-swin-small-coco-instance"
MOST_DETECTIONS = 100  # per image
BACKGROUND = (0x99, 0x99, 0x99)
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# COCO's 80 classes in its order, with the names of GenEval's prompts.
CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class Mask2Former:
    """Finds objects and their masks; see the module docstring.

    Args:
        weights: Folder with ``config.json`` and ``model.safetensors``, or Hub id.
        device: Device of the network; ``None`` for the accelerator if there is one.
        dtype: Dtype of the network.
        side: Shorter side of the network's input in pixels; the longer one is at most 5/3 of it.
    """

    def __init__(
        self,
        weights: str | Path = SOURCE,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        side: int = 800,
    ) -> None:
        self.weights, self.device, self.dtype, self.side = str(weights), resolve_device(device or "auto"), dtype, side
        self.network: Any = None
        self.classes: Any = None
        self.names: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def load(self) -> None:
        """Loads the network unless it is loaded already.

        Raises:
            FileNotFoundError: If weights are missing; the message says where to get them.
            ValueError: If they are not Mask2Former's.
        """
        from transformers import Mask2FormerImageProcessorPil, Mask2FormerModel

        class Body(Mask2FormerModel):  # without the head, whose training loss needs SciPy
            _keys_to_ignore_on_load_unexpected = ("class_predictor", "criterion")

        with self._lock:
            if self.network is not None:
                return
            how = f"Pass weights=FOLDER with config.json and model.safetensors of {SOURCE}."
            folder = Path(self.weights)
            file = find_weights(folder if folder.is_dir() else None, f"{self.weights}/model.safetensors", how)
            try:
                with quietly():
                    network, info = Body.from_pretrained(self.weights, use_safetensors=True, output_loading_info=True)
            except (OSError, ValueError) as error:
                raise FileNotFoundError(f"{self.weights} could not be loaded ({error}). {how}") from error
            state = read_state_dict(file)
            head = {part: state.get(f"class_predictor.{part}") for part in ("weight", "bias")}
            if info["missing_keys"] or info["mismatched_keys"] or any(value is None for value in head.values()):
                raise ValueError(f"{file} does not hold Mask2Former with its classes: {info!r:.300}")
            classes = torch.nn.Linear(network.config.hidden_dim, network.config.num_labels + 1)
            classes.load_state_dict(head)
            labels = network.config.id2label
            self.names = CLASSES if len(labels) == len(CLASSES) else tuple(labels[i] for i in range(len(labels)))
            self.processor = Mask2FormerImageProcessorPil(
                size={"shortest_edge": self.side, "longest_edge": self.side * 5 // 3}, size_divisor=32
            )
            self.classes = classes.to(self.device, self.dtype).eval().requires_grad_(False)
            self.network = network.to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        """The objects of an image, unsorted, with every confidence."""
        self.load()
        pixels = self.processor(image.convert("RGB"), return_tensors="pt").pixel_values
        found = self.network(pixels.to(self.device, self.dtype), output_hidden_states=True)
        logits = self.classes(found.transformer_decoder_intermediate_states[-1].transpose(0, 1))[0]  # (Q, K + 1)
        return self.objects(logits.float(), found.masks_queries_logits[-1].float(), image.size, pixels.shape[2:])

    def objects(
        self, logits: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], read: Sequence[int]
    ) -> list[Detection]:
        """Detections from the outputs of the network.

        Args:
            logits: Of the classes, the last one for no object: ``(Q, K + 1)``.
            masks: Logits of the pixels ``(1, Q, h, w)``.
            size: Width and height of the image.
            read: Height and width of the network's input.
        """
        likely, where = logits.softmax(-1)[:, :-1].flatten().topk(min(MOST_DETECTIONS, logits[:, :-1].numel()))
        masks = F.interpolate(masks, tuple(read), mode="bilinear", align_corners=False)
        masks = F.interpolate(masks, size[::-1], mode="bilinear", align_corners=False)[0]
        seen = masks > 0
        sure = (masks.sigmoid() * seen).sum((1, 2)) / (seen.sum((1, 2)) + 1e-6)
        detections = []
        for probability, index in zip(likely.tolist(), where.tolist(), strict=True):
            query, label = divmod(index, logits.shape[1] - 1)
            if not seen[query].any():
                continue
            across, down = (seen[query].any(axis).nonzero()[:, 0].tolist() for axis in (0, 1))
            box = (float(across[0]), float(down[0]), across[-1] + 1.0, down[-1] + 1.0)
            score = probability * sure[query].item()
            detections.append(Detection(self.names[label], box, score, seen[query].cpu()))
        return detections


class GenEval:
    """1 for an image that shows what its prompt asks for, 0 for others; see the module docstring. Range: 0 or 1.

    Only prompts of ``metadata`` can be judged. ``noisear evaluate --prompts geneval`` with this scorer prints the
    accuracy by category and its mean, as the published summary.

    Args:
        metadata: ``evaluation_metadata.jsonl`` of GenEval, or your own file of such rows.
        weights: Folder or Hub id of the detector; ``None`` for the published one.
        clip: Options of the :class:`~noisear_rl.rewards.clip.CLIPScore` that tells colors.
        device: Device of both networks; ``None`` for the accelerator if there is one.
        dtype: Dtype of both networks.
        side: See :class:`Mask2Former`.
        max_overlap: See :func:`~noisear_rl.rewards.geneval.kept_objects`.

    Raises:
        ValueError: If an option is invalid, or a row of the file is none of GenEval's.
        FileNotFoundError: If there is no such file.
    """

    name = "geneval"
    source, head_source = f"{SOURCE}/model.safetensors", CLIPScore.source
    clip_class = CLIPScore

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        metadata: str | Path | None = None,
        clip: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        side: int = 800,
        max_overlap: float = 1.0,
    ) -> None:
        if metadata is None:
            raise ValueError(
                f"scorer {self.name!r}: pass metadata=FILE with evaluation_metadata.jsonl of djghosh13/geneval, which "
                "says what each prompt asks for"
            )
        if side < 32 or not 0 < max_overlap <= 1:
            raise ValueError(f"side must be at least 32 and max_overlap in (0, 1], got {side} and {max_overlap}")
        self.rows = read_metadata(Path(metadata))
        self.clip = self.clip_class(**{"device": device, "dtype": dtype} | dict(clip or {}))
        assert isinstance(self.clip.dtype, torch.dtype)  # checked by the line before
        self.detector = Mask2Former(weights or SOURCE, device=device, dtype=self.clip.dtype, side=side)
        self.max_overlap = max_overlap
        self._texts: dict[str, torch.Tensor] = {}

    def score(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores images: ``(B,)`` float32, 0 or 1, on their device, without gradient.

        Raises:
            ValueError: If shapes, values or prompts are invalid, or a prompt is not in the metadata.
            FileNotFoundError: If weights are missing.
        """
        where = images.device if isinstance(images, torch.Tensor) else self.detector.device
        return torch.tensor([float(one.correct) for one in self.verdicts(images, prompts)], device=where)

    def verdicts(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
        """Whether each image is correct, and why not; see :meth:`score`."""
        check_images(images, prompts)
        if unknown := [prompt for prompt in prompts if prompt.strip() not in self.rows]:
            raise ValueError(f"scorer {self.name!r}: {unknown[0]!r:.80} is not among the prompts of its metadata")
        if isinstance(images, torch.Tensor):
            images = [Image.fromarray(to_uint8(image.float())) for image in images.detach()]
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            row, image = self.rows[prompt.strip()], image.convert("RGB")
            kept = kept_objects(self.detector.detect(image), row["tag"], max_overlap=self.max_overlap)
            found.append(judge(row, kept, partial(self.colors, image)))
        return found

    def colors(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """The color of each object of one class."""
        blank = Image.new("RGB", image.size, BACKGROUND)
        crops = []
        for one in objects:
            mask = Image.new("L", image.size, 255)
            if one.mask is not None:
                mask = Image.fromarray(one.mask.to(torch.uint8).mul(255).numpy())
            crops.append(Image.composite(image, blank, mask).crop(one.box))
        self.clip.load()
        with torch.no_grad():
            pixels = self.clip.preprocessing.exact(crops).to(self.clip.device, self.clip.dtype)
            cosines = self.clip.image_features(pixels) @ self._classifier(objects[0].name).T
        return [COLORS[i] for i in cosines.argmax(1).tolist()]

    def _classifier(self, name: str) -> torch.Tensor:
        """A unit vector per color ``(10, D)``: the mean of its texts."""
        if name not in self._texts:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            each = self.clip.encode_text(*self.clip.tokenize(texts))[0].unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._texts[name] = F.normalize(each.mean(1), dim=-1)
        return self._texts[name]


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of GenEval's metadata by prompt.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is not one of GenEval's; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected evaluation_metadata.jsonl of djghosh13/geneval")
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, tag, include = row["prompt"].strip(), row["tag"], row["include"]
            entries = [*include, *row.get("exclude", ())]
            fine = (
                bool(include) and isinstance(tag, str) and all(_is_entry(entry, i) for i, entry in enumerate(entries))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: no row of GenEval ({type(error).__name__}: {error})") from error
        if not fine or rows.get(prompt, row) != row:
            what = "asks for something else above" if fine else "asks for nothing that GenEval's rules know"
            raise ValueError(f"{path}, line {number}: {prompt!r:.80} {what}")
        rows[prompt] = row
    return rows


def _is_entry(entry: Mapping[str, Any], number: int) -> bool:
    """Whether an entry can be judged; its position refers to an earlier one."""
    fine = isinstance(entry["class"], str) and type(entry["count"]) is int and entry["count"] > 0
    wanted, target = entry.get("position", ("above", 0)) if number else ("above", 0)
    return fine and entry.get("color", COLORS[0]) in COLORS and type(target) is int and target < max(number, 1)
