"""Objects and colors of photographs, on a tiny Mask2Former and a tiny CLIP of the published classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerImageProcessorPil,
    Mask2FormerModel,
    SwinConfig,
)

from noisear_rl.algos import evaluate
from noisear_rl.evaluation.intervals import category_mean, category_means
from noisear_rl.rewards import check_reward, load_reward
from noisear_rl.rewards.clip import CLIPScore
from noisear_rl.rewards.detection import CLASSES, GenEval, Mask2Former, read_metadata
from noisear_rl.rewards.geneval import COLORS, Detection, accuracy
from tests import tiny_pipelines
from tests.rewards import tiny_scorers

TEXTS = tiny_scorers.architecture()
TEXTS["text_config"]["max_position_embeddings"] = 32
DOG, CAT = CLASSES.index("dog"), CLASSES.index("cat")
ROWS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
    *(
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": color}], "prompt": f"a {color} dog"}
        for color in COLORS
    ),
]


def config(**changes):
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    sizes |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 64)
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    return Mask2FormerConfig(backbone_config=backbone, **sizes | {"num_labels": 80} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A detector that takes everything for a dog, a tiny CLIP, and metadata."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("detector")
    own = config()
    own.save_pretrained(folder)
    state = {f"model.{name}": value.clone() for name, value in Mask2FormerModel(own).state_dict().items()}
    head = torch.nn.Linear(32, 81)
    head.bias.data[DOG] += 6
    state |= {f"class_predictor.{name}": value for name, value in head.state_dict().items()}
    save_file(state | {"criterion.empty_weight": torch.ones(81)}, folder / "model.safetensors")
    clip = CLIPModel(CLIPConfig(**TEXTS))
    for parameter in clip.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    save_file(clip.state_dict(), folder / "clip.safetensors")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


class Tiny(GenEval):
    clip_class = tiny_scorers.shrunk(CLIPScore, architecture=TEXTS, max_tokens=32)


def scorer(folder, **options):
    clip = {"weights": folder / "clip.safetensors"}
    given = {"metadata": folder / "metadata.jsonl", "clip": clip, "device": "cpu", "side": 64}
    return Tiny(folder, **given | options)


def photographs(count, width=90, height=70):
    noise = np.random.default_rng(0).integers(0, 256, (count, height // 10, width // 10, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in noise]


def test_detections_are_those_of_transformers(folder):
    """Its own post-processing works at 384 px; there, both agree on masks, classes and confidence."""
    detector = Mask2Former(folder, device="cpu", side=384)
    picture = photographs(1, 384, 384)[0]
    found = detector.detect(picture)
    processor = Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}, size_divisor=32)
    with torch.no_grad():
        outputs = detector.network(processor(picture, return_tensors="pt").pixel_values, output_hidden_states=True)
        last = outputs.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        outputs.class_queries_logits = detector.classes(last)
        outputs.masks_queries_logits = outputs.masks_queries_logits[-1]
    (expected,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, return_binary_maps=True)
    by_score = lambda scores: sorted(range(len(scores)), key=lambda i: -scores[i])
    theirs = by_score([segment["score"] for segment in expected["segments_info"]])
    ours = sorted(found, key=lambda one: -one.score)[: len(theirs)]
    assert len(theirs) > 3 and {one.name for one in ours} >= {"dog"}
    for one, i in zip(ours, theirs, strict=True):
        segment, mask = expected["segments_info"][i], expected["segmentation"][i] == 1
        assert one.score == pytest.approx(segment["score"], abs=2e-6)
        assert one.name == CLASSES[segment["label_id"]] and torch.equal(one.mask, mask)
        rows, columns = np.where(mask.numpy())
        assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_boxes_and_confidence_of_hand_made_outputs(folder):
    """Two queries at a quarter of the image's size: a wide dog and a small cat."""
    detector = Mask2Former(folder, device="cpu", side=64)
    detector.load()
    logits = torch.full((2, 81), -20.0)
    logits[0, DOG], logits[1, CAT], logits[1, -1] = 5.0, 3.0, 3.0
    masks = torch.full((1, 2, 16, 32), -10.0)
    masks[0, 0, 4:8, 2:30], masks[0, 1, 10:12, 16:18] = 10.0, 10.0
    found = {one.name: one for one in detector.objects(logits, masks, (128, 64), (64, 128)) if one.score > 0.1}
    assert set(found) == {"dog", "cat"}
    assert found["dog"].box == pytest.approx((8, 16, 120, 32), abs=1) and found["dog"].score > 0.9
    assert found["cat"].box == pytest.approx((64, 40, 72, 48), abs=1) and 0.4 < found["cat"].score < 0.5
    assert found["cat"].mask.sum() == pytest.approx(64, abs=20)


def test_scores_are_the_verdicts_of_the_rules(folder):
    """Everything is a dog: dogs are there, cats are not, and exactly one of the ten colors is right."""
    judge = scorer(folder)
    pictures = photographs(1) * len(ROWS)
    prompts = [row["prompt"] for row in ROWS]
    scores = judge.score(pictures, prompts)
    assert scores[:2].tolist() == [1, 0] and scores.dtype == torch.float32
    assert scores[3:].sum() == 1
    verdicts = judge.verdicts(pictures, prompts)
    assert verdicts[1].reasons == ("expected 1 cat, found 0",)
    confident = [one for one in judge.detector.detect(pictures[0]) if one.name == "dog" and one.score > 0.9]
    assert scores[2] == (len(confident) >= 2)
    images = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures])
    assert torch.equal(judge.score(images, prompts), scores)
    alone = [judge.score([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)]
    assert torch.equal(torch.cat(alone), scores)


def test_accuracy_by_category_is_what_evaluations_print(folder):
    """The table's means of an evaluation are GenEval's summary of the same verdicts."""
    pictures, rows = photographs(2), [ROWS[i] for i in (0, 1, 2, 3, 4)]
    judge, tags = scorer(folder), [row["tag"] for row in rows]
    scores = np.array([[judge.score([picture], [row["prompt"]]).item() for picture in pictures] for row in rows])
    summary = accuracy([bool(one) for one in scores.flatten()], np.repeat(tags, 2).tolist())
    assert category_means(scores, tags) == pytest.approx({name: summary[name] for name in dict.fromkeys(tags)})
    assert category_mean(scores, tags) == pytest.approx(summary["overall"])


@pytest.mark.filterwarnings("ignore:prompt contains words")
def test_an_evaluation_prints_the_accuracy_by_category(folder, tmp_path):
    """With the metadata as prompts and the scorer as the judge; no row asks for a color, so that CLIP is not loaded."""
    metadata, reward = tmp_path / "metadata.jsonl", tmp_path / "geneval.yaml"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    options = {"metadata": str(metadata), "weights": str(folder), "side": 64, "device": "cpu"}
    reward.write_text(json.dumps({"weights": {"geneval": 1.0}, "options": {"geneval": options}}))
    tiny_pipelines.build("sdxl").save_pretrained(tmp_path / "sdxl")
    config = evaluate.EvaluateConfig(
        ("best-of-2",),
        denoiser="sdxl",
        prompts=str(metadata),
        samples=2,
        scorers=(str(reward),),
        choose_by="brightness",
        output_dir=tmp_path / "evaluation",
        denoiser_options={"path": str(tmp_path / "sdxl"), "num_inference_steps": "1", "cache_dir": "none"},
    )
    head, _, *rows = [line for line in evaluate.run(config).splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in head.split("|")]
    assert len(rows) == 2
    for row in rows:
        cells = dict(zip(columns, (cell.strip() for cell in row.split("|")), strict=True))
        assert cells["single_object (%)"] == "50.0"  # a dog is everywhere, a cat nowhere
        assert float(cells["geneval (%)"]) == pytest.approx((50 + float(cells["counting (%)"])) / 2, abs=0.1)


def test_colors_are_the_nearest_texts(folder):
    """The object alone before gray, cut out at its box, against the mean of three texts."""
    judge = scorer(folder)
    picture = photographs(1)[0]
    mask = torch.zeros(70, 90, dtype=torch.bool)
    mask[10:40, 20:80] = True
    mask[10:20, 20:30] = False  # the box is the mask's, not full
    dog = Detection("dog", (20.0, 10.0, 80.0, 40.0), 0.9, mask)
    pixels = np.array(picture)
    pixels[~mask.numpy()] = 0x99
    crop = Image.fromarray(pixels[10:40, 20:80])
    clip = judge.clip
    clip.load()
    seen = clip.embed(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255)
    likeness = []
    for color in COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        mean = torch.cat([clip.encode_text(*clip.tokenize([text]))[0] for text in texts]).mean(0)
        likeness.append((seen[0] @ mean / mean.norm()).item())
    assert judge.colors(picture, [dog]) == [COLORS[int(np.argmax(likeness))]]
    whole = judge.colors(picture, [dog, Detection("dog", (0.0, 0.0, 90.0, 70.0), 0.8)])
    assert whole[0] == judge.colors(picture, [dog])[0] and len(whole) == 2


def test_by_name_with_a_file(folder, tmp_path):
    assert check_reward("geneval") == "geneval"
    reward = load_reward(
        "geneval", options={"geneval": {"metadata": folder / "metadata.jsonl", "weights": folder}}, device="cpu"
    )
    assert isinstance(reward.rewards[0][0], GenEval) and reward.rewards[0][0].detector.device.type == "cpu"
    with pytest.raises(ValueError, match="pass metadata=FILE"):
        load_reward("geneval")
    with pytest.raises(FileNotFoundError, match="no such file; expected evaluation_metadata"):
        scorer(folder, metadata=tmp_path / "none.jsonl")
    for options in ({"side": 0}, {"max_overlap": 0.0}):
        with pytest.raises(ValueError, match="side must be at least 32 and max_overlap in"):
            scorer(folder, **options)
    with pytest.raises(ValueError, match="'a photo of a hen' is not among the prompts"):
        scorer(folder).score(photographs(1), ["a photo of a hen"])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tag": "colors"}, "no row of GenEval"),
        ("text", "no row of GenEval"),
        ({"tag": "colors", "include": [], "prompt": "a"}, "asks for nothing"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}], "prompt": "a"}, "asks for nothing"),
        (
            {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "teal"}], "prompt": "a"},
            "asks for nothi",
        ),
        ({"tag": "x", "include": [ROWS[0]["include"][0] | {"position": ["above", 0]}] * 2, "prompt": "b"}, None),
        ({"tag": "x", "include": [{}, {"class": "dog", "count": 1}], "prompt": "b"}, "no row of GenEval"),
        ({"tag": "x", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a dog"}, "something else above"),
    ],
)
def test_rows_that_cannot_be_judged(row, problem, tmp_path):
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps(row) + "\n")
    if problem is None:
        assert set(read_metadata(file)) == {"a photo of a dog", "b"}
        return
    with pytest.raises(ValueError, match=f"line 3: .*{problem}"):
        read_metadata(file)


def test_files_that_hold_no_detector(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file\. Pass weights=FOLDER"):
        Mask2Former(tmp_path, device="cpu").detect(photographs(1)[0])
    config().save_pretrained(tmp_path)
    save_file({"class_predictor.bias": torch.zeros(81)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold Mask2Former with its classes"):
        Mask2Former(tmp_path, device="cpu").detect(photographs(1)[0])


def test_the_published_size():
    """Swin-S, 100 queries, 80 classes: 69 million parameters, as in the paper's table 1."""
    published = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=80,
    )  # fmt: skip
    with torch.device("meta"):
        network = Mask2FormerModel(published)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == 69
    assert len(set(CLASSES)) == len(CLASSES) == 80
