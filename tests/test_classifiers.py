"""Image classifiers: the walk bit for bit, masks against plain hooks, exact sparsity after reloading, bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

import wanda
from classifiers import (
    CLASSES,
    FAMILIES,
    SIDE,
    WALKED,
    classifier,
    image_folder,
    processor_file,
    saved_classifier,
    square_sums,
    wanda_mask,
)
from wanda.blocks import record, refuse_changed_arguments
from wanda.chain import first_tensor
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.skeleton import Skeleton
from wanda.commands.eval import Options, evaluate
from wanda.errors import ConfigurationError, RunError
from wanda.evaluation.accuracy import ranks
from wanda.images import calibration_images, load_processor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "set")


def calibrated(images: Path, folder: Path, samples: int = 8) -> torch.Tensor:
    return calibration_images(str(images), load_processor(folder), samples=samples, seed=0)


@pytest.mark.parametrize("family", WALKED)
def test_blocks_loaded_one_by_one_replay_the_classifier_bit_for_bit(family: str, tmp_path: Path) -> None:
    folder, pixels = saved_classifier(family, tmp_path), torch.randn(3, 3, SIDE, SIDE)
    model = classifier(family)
    skeleton = Skeleton(Checkpoint.open(folder), torch.float32, torch.device("cpu"))
    blocks = skeleton.blocks
    with torch.no_grad():
        skeleton.load_outside()
        recording = record(skeleton.model, blocks, [pixels[:2], pixels[2:]])
        hidden = list(recording.hidden)
        for index, block in enumerate(blocks.modules):
            skeleton.load_block(index)
            for part, calls in enumerate(recording.calls):
                hidden[part] = refuse_changed_arguments(calls[index], block, hidden[part], f"block {index}")
            skeleton.drop_block(index)
        seen: list[Any] = []
        model.get_submodule(blocks.names[-1]).register_forward_hook(lambda _, args, output: seen.append(output))
        for part in (pixels[:2], pixels[2:]):
            model(part)
    assert len(blocks) == WALKED[family][1]
    assert all(parameter.is_meta for block in blocks.modules for parameter in block.parameters())
    assert all(torch.equal(mine, first_tensor(its)) for mine, its in zip(hidden, seen, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("propagate", ["none", "layer"])
def test_masks_equal_plain_hooks_and_survive_reloading(
    family: str, group: str, propagate: str, images: Path, tmp_path: Path
) -> None:
    """none: the inputs of the dense model; layer: the inputs that every layer of the pruned model really gets."""
    folder, out = saved_classifier(family, tmp_path / "model"), tmp_path / "pruned"
    report: Any = wanda.prune(
        folder,
        out=out,
        sparsity=0.6,
        group=group,
        propagate=propagate,  # type: ignore[arg-type]
        calibration=f"images:{images}",
        samples=8,
        batch=3,
        dtype="float32",
        progress=False,
    )
    dense = AutoModelForImageClassification.from_pretrained(folder).eval()
    pruned = AutoModelForImageClassification.from_pretrained(out).eval()
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    sums = square_sums(dense if propagate == "none" else pruned, calibrated(images, folder), FAMILIES[family][1])
    assert {row["name"] for row in report.layers} == set(sums)
    changed = {f"{name}.weight" for name in sums}
    for name, square_sum in sums.items():
        weight = before[f"{name}.weight"]
        mask = wanda_mask(weight, square_sum, 0.6, group)
        assert torch.equal(after[f"{name}.weight"], weight * mask), name
    assert all(torch.equal(after[name], before[name]) for name in before if name not in changed)
    head = [name for name in report.left_dense if "classifier" in name]
    stem = [name for name in report.left_dense if "embeddings" in name]
    assert head and stem
    if family == "ConvNext":
        assert any(name.endswith("dwconv.weight") for name in report.left_dense)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageClassification" in card and f"8 images (3 x {SIDE} x {SIDE})" in card


def test_two_passes_and_magnitude_and_a_pattern(images: Path, tmp_path: Path) -> None:
    folder = saved_classifier("Swin", tmp_path / "model")
    for number, options in enumerate(
        (
            {"propagate": "block", "method": "sparsegpt", "calibration": f"images:{images}", "samples": 8},
            {"method": "magnitude"},
            {"pattern": "2:4", "calibration": f"images:{images}", "samples": 8},
        )
    ):
        report: Any = wanda.prune(folder, out=tmp_path / str(number), progress=False, **options)
        pruned = AutoModelForImageClassification.from_pretrained(tmp_path / str(number))
        zeros = {name: int((parameter == 0).sum()) for name, parameter in pruned.named_parameters()}
        assert all(zeros[f"{row['name']}.weight"] == row["removed"] for row in report.layers)
        assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("propagate", ["none", "layer"])
def test_a_run_that_broke_off_resumes_in_the_same_bytes(
    propagate: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanda.block_loop import BlockLoop

    options: dict[str, Any] = {
        **{"calibration": f"images:{images}", "samples": 6, "progress": False, "propagate": propagate},
        "memory": "8GB",
    }
    folder = saved_classifier("Swin", tmp_path / "model")
    wanda.prune(folder, out=tmp_path / "whole", **options)
    original = BlockLoop._prune

    def breaks(self: BlockLoop, index: int, *args: Any) -> None:
        if index == 4:
            raise RunError("broke off")
        original(self, index, *args)

    monkeypatch.setattr(BlockLoop, "_prune", breaks)
    with pytest.raises(RunError, match="broke off"):
        wanda.prune(folder, out=tmp_path / "again", **options)
    monkeypatch.undo()
    wanda.prune(folder, out=tmp_path / "again", resume=True, **options)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_classifier_in_memory(images: Path, tmp_path: Path) -> None:
    folder = saved_classifier("ConvNext", tmp_path / "model")
    pixels = calibrated(images, folder)
    model = classifier("ConvNext")
    sums = square_sums(model, pixels, FAMILIES["ConvNext"][1])
    masks = {n: wanda_mask(model.get_submodule(n).weight, s, 0.5, "row") for n, s in sums.items()}
    report = wanda.prune_model(model, pixels, propagate="none")
    assert report.calibration["image"] == [3, SIDE, SIDE]
    assert all(torch.equal(model.get_submodule(name).weight != 0, mask) for name, mask in masks.items())


def test_drawing_images_is_seeded_and_without_repeats(images: Path, tmp_path: Path) -> None:
    processor = load_processor(saved_classifier("ViT", tmp_path))
    one, same, other = (calibration_images(str(images), processor, samples=9, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    everything = calibration_images(str(images), processor, samples=18)
    assert len({tensor.numpy().tobytes() for tensor in everything}) == 18


def test_images_of_a_parquet_file_and_a_saved_set_are_those_of_the_folder(images: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(images.rglob("*.png"))
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "label": [CLASSES.index(file.parent.name) for file in files],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}),
    )
    datasets.disable_progress_bars()
    table.to_parquet(tmp_path / "set.parquet")
    table.save_to_disk(tmp_path / "disk")
    folder = saved_classifier("ViT", tmp_path / "model")
    processor = load_processor(folder)
    expected = calibration_images(str(images), processor, samples=7, seed=3)
    accuracies = [evaluate([str(folder)], Options(images=str(images)))[0].accuracy]
    for source in (str(tmp_path / "set.parquet"), f"hf:{tmp_path / 'disk'}"):
        assert torch.equal(calibration_images(source, processor, samples=7, seed=3), expected)
        accuracies.append(evaluate([str(folder)], Options(images=source))[0].accuracy)
    assert len({(found.top1, found.top5, found.images) for found in accuracies if found is not None}) == 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, None] * 9, "row 1 is of no class; give every row of the column label the number or the name"),
        (["ant", None] * 9, "row 1 is of no class; give every row of the column label"),
        ([None] * 18, "row 0 is of no class; give every row of the column label"),
        ([0.0, 1.5] * 9, "row 0 is of no class; give every row of the column label"),
        ([[0], [1, 2]] * 9, "row 0 is of no class; give every row of the column label"),
        ([0, -1] * 9, "row 1 is of no class; give every row of the column label"),  # a set whose labels are secret
        ([-1] * 18, "row 0 is of no class; give every row of the column label"),
        (None, "row 0 is of no class; give the table a column label with the number or the name"),
    ],
)
def test_labels_of_no_class_matter_to_evaluation_only(
    labels: list[Any] | None, said: str, images: Path, tmp_path: Path
) -> None:
    import datasets

    files = sorted(images.rglob("*.png"))
    columns: dict[str, Any] = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files]}
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(columns | ({} if labels is None else {"label": labels}))
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set.parquet")
    folder = saved_classifier("ViT", tmp_path / "model")
    processor = load_processor(folder)
    found = calibration_images(str(tmp_path / "set.parquet"), processor, samples=7, seed=3)
    assert torch.equal(found, calibration_images(str(images), processor, samples=7, seed=3))
    with pytest.raises(ConfigurationError) as caught:
        evaluate([str(folder)], Options(images=str(tmp_path / "set.parquet")))
    assert said in str(caught.value)


def test_accuracy_equals_counting_and_is_kept_with_the_checkpoint(images: Path, tmp_path: Path) -> None:
    folder, out = saved_classifier("ViT", tmp_path / "model"), tmp_path / "pruned"
    wanda.prune(folder, out=out, method="magnitude", progress=False)
    found = evaluate([str(out)], Options(images=str(images), dtype="float32", batch=4))[0].accuracy
    assert found is not None
    model, processor = AutoModelForImageClassification.from_pretrained(out).eval(), load_processor(out)
    from PIL import Image

    first = among = 0
    files = sorted(images.rglob("*.png"))
    for file in files:
        pixels = processor([Image.open(file)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            best = model(pixels).logits[0].argsort(descending=True)[:5].tolist()
        target = model.config.label2id[file.parent.name]
        first += best[0] == target
        among += target in best
    share = first / len(files)
    assert (found.top1, found.top5, found.images) == (share, among / len(files), len(files))
    assert found.top1_error == pytest.approx((share * (1 - share) / len(files)) ** 0.5)
    kept = json.loads((out / "wanda.json").read_text(encoding="utf-8"))["evaluation"]["images"]
    assert kept["set, 18 images"]["top1"] == share
    assert "| images | set, 18 images |" in (out / "README.md").read_text(encoding="utf-8")


def test_a_tie_with_the_right_class_counts_as_a_miss() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert ranks(logits, torch.tensor([0, 0])).tolist() == [1, 0]


def faults_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        wanda.prune(*arguments, **options, progress=False)
    return str(caught.value)


def test_bad_input_is_one_message_with_the_cure_and_nothing_written(images: Path, tiny: Path, tmp_path: Path) -> None:
    folder, out = saved_classifier("ViT", tmp_path / "model"), tmp_path / "out"
    good = f"images:{images}"
    (tmp_path / "empty").mkdir()
    assert "holds no images" in faults_of(folder, out=out, calibration=f"images:{tmp_path / 'empty'}")
    assert "there is no folder of images" in faults_of(folder, out=out, calibration="images:nowhere")
    assert "calibrated with images: --calibration images:FOLDER" in faults_of(folder, out=out)
    assert "is a decoder, which is calibrated with text" in faults_of(tiny, out=out, calibration=good)
    assert "--seqlen 8 is of text" in faults_of(folder, out=out, calibration=good, seqlen=8)
    assert "give --samples 18" in faults_of(folder, out=out, calibration=good)
    assert "--skip-unreadable is of images" in faults_of(tiny, out=out, calibration="builtin", skip_unreadable=True)
    assert "--inherit would change nothing" in faults_of(
        tiny, out=out, calibration="builtin", propagate="none", inherit=0.5, method="best"
    )
    broken = Path(shutil.copytree(images, tmp_path / "broken"))
    (broken / "ant" / "000.png").write_bytes(b"not a picture")
    said = faults_of(folder, out=out, calibration=f"images:{broken}", samples=18)
    assert "ant/000.png cannot be read (no image)" in said and "--skip-unreadable" in said
    report: Any = wanda.prune(
        folder, out=out, calibration=f"images:{broken}", samples=17, skip_unreadable=True, progress=False
    )
    assert sum("000.png" in note and "left out" in note for note in report.notes) == 1
    shutil.rmtree(out)
    processor_file(folder, side=20)
    assert "makes images of 3 x 20 x 20, which the model does not take" in faults_of(
        folder, out=out, calibration=good, samples=8
    )
    (folder / "preprocessor_config.json").unlink()
    assert "copy preprocessor_config.json" in faults_of(folder, out=out, calibration=good, samples=8)
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_models_that_are_neither_or_lack_a_head_are_refused(images: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "vocab_size": 8}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    out = tmp_path / "out"
    said = faults_of(tmp_path / "t5", out=out, calibration="builtin")
    assert "T5ForConditionalGeneration is neither a decoder nor an image classifier" in said
    classifier("ViT").vit.save_pretrained(tmp_path / "bare")
    processor_file(tmp_path / "bare")
    said = faults_of(tmp_path / "bare", out=out, calibration=f"images:{images}", samples=4)
    assert "lacks classifier." in said and "no trained classifier" in said
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "mixer_s32_224"}', encoding="utf-8")
    (tmp_path / "timm" / "model.safetensors").write_bytes((tmp_path / "bare" / "model.safetensors").read_bytes())
    try:
        import timm  # noqa: F401
    except ImportError:
        assert "pip install 'wanda-prune[vision]'" in faults_of(tmp_path / "timm", out=out, method="magnitude")


def test_evaluation_refuses_what_it_would_ignore_and_strange_classes(images: Path, tiny: Path, tmp_path: Path) -> None:
    folder = saved_classifier("ViT", tmp_path / "model")
    with pytest.raises(ConfigurationError, match="--seqlen and --windows would change nothing beside --images"):
        evaluate([str(folder)], Options(images=str(images), seqlen=8, windows=2))
    with pytest.raises(ConfigurationError, match="is no image classifier"):
        evaluate([str(tiny)], Options(images=str(images)))
    with pytest.raises(ConfigurationError, match="is an image classifier; measure it with --images"):
        evaluate([str(folder)], Options(text="builtin"))
    with pytest.raises(ConfigurationError, match="--skip-unreadable would change nothing"):
        evaluate([str(tiny)], Options(text="builtin", skip_unreadable=True))
    strange = image_folder(tmp_path / "strange")
    (strange / "fox").rename(strange / "gnu")
    shutil.rmtree(strange / "ant")
    with pytest.raises(ConfigurationError, match=r"has 5 classes \(gnu among them\), the model 6"):
        evaluate([str(folder)], Options(images=str(strange)))


def test_timm_models() -> None:
    """timm needs torchvision, whose build for another torch breaks imports: both lie apart, for this test alone."""
    apart = Path(sys.prefix) / "vision"
    environment = dict(os.environ)
    if apart.is_dir():
        paths = [str(ROOT / "tests" / "torchvision_alone"), str(apart), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "timm_models.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "No module named 'timm'" in done.stdout:
        pytest.skip("timm and torchvision are not installed: make install")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
