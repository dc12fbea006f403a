"""``hf-dis estimate``: sizes from configs alone, when sampling pays, and configs that it refuses."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerator_counts import SHAPES, count
from tiny_models import gpt2, llama, resnet, vit

from hf_dis.commands.main import main
from hf_dis.estimate import BLOCK_LAUNCHES, EXACT_LAUNCHES, SAMPLED_LAUNCHES, Device, Outline, estimate, outline
from hf_dis.models.tasks import Task

LLAMA = {"intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.fixture
def saved(tmp_path):
    """Saves a configuration without weights, by name."""

    def save(name, config, architecture=None):
        config.architectures = [architecture] if architecture else None
        config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def llamas(saved):
    """A teacher of 8 billion parameters and a student of 1 billion, by their configs."""
    teacher = hf.LlamaConfig(vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, **LLAMA)
    student = hf.LlamaConfig(vocab_size=128_256, hidden_size=2048, num_hidden_layers=16, **LLAMA)
    student.tie_word_embeddings = True
    return saved("teacher", teacher, "LlamaForCausalLM"), saved("student", student, "LlamaForCausalLM")


def told(capsys, *words):
    """The error of a command that is refused: one line, and nothing on stdout."""
    try:
        code = main(["estimate", *words])
    except SystemExit as error:  # of argparse
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("hf-dis estimate: error: ")
    return err


@pytest.mark.parametrize(
    "model", [llama(50), gpt2(50), vit(40), resnet(40)], ids=["untied", "tied", "transformer", "convolutions"]
)
def test_an_outline_has_the_sizes_of_the_model(saved, model):
    found = outline(saved("model", model.config, type(model).__name__))
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else model.classifier
    head = head[-1] if isinstance(head, torch.nn.Sequential) else head
    assert found.kind == type(model).__name__ and found.num_features == head.in_features
    assert found.num_classes == head.out_features
    assert found.parameters == sum(one.numel() for one in model.parameters())
    embeddings = model.get_input_embeddings() if hasattr(model, "lm_head") else None
    outside = {id(one): one.numel() for one in head.parameters()}
    outside |= {id(one): one.numel() for one in embeddings.parameters()} if embeddings is not None else {}
    assert found.body == found.parameters - sum(outside.values())
    assert found.head_is_tied == (embeddings is not None and embeddings.weight is head.weight)


def test_no_weight_is_read_or_made(llamas, capsys, monkeypatch):
    with torch.device("meta"):  # at its first use torch collects the functions that make tensors
        empty = torch.empty
        empty(1)

    def watched(*shape, **options):
        made = empty(*shape, **options)
        assert made.device.type == "meta" or made.numel() < 2**20
        return made

    monkeypatch.setattr(torch, "empty", watched)
    assert main(["estimate", "--teacher", llamas[0], "--student", llamas[1]]) == 0
    lines = capsys.readouterr().out
    assert "5,614 M parameters" in lines and "head of 128,256 x 2,048, tied to the embeddings" in lines
    assert "Sampling pays" in lines and "num_sampled_classes=16, num_shared_classes=1024, num_tails=16" in lines


def test_images_are_counted_by_their_operations(saved):
    config = hf.ViTConfig(image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    found = outline(saved("vit", config, "ViTForImageClassification"))
    linear = sum(
        module.weight.numel()
        for name, module in hf.ViTForImageClassification(config).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "classifier"
    )
    tokens = 17  # 16 patches and the class token
    assert found.flops(tokens, 3) == 3 * found.example_flops
    assert 2 * linear * tokens < found.example_flops < 4 * linear * tokens


def test_sampling_pays_for_many_classes(saved):
    """And row-sparse gradients where a pass over the head takes a large part of the step."""
    found = {}
    for classes in (1_000, 200_000):
        config = hf.ViTConfig(num_labels=classes, hidden_size=192, num_attention_heads=3)
        model = outline(saved(f"vit-{classes}", config, "ViTForImageClassification"))
        for items in (16, 256):
            found[classes, items] = estimate(model, model, batch_size=items, sequence_length=1)
    assert {key for key, one in found.items() if one.sampling_pays} == {(200_000, 256)}
    assert {key for key, one in found.items() if one.row_sparse} == {(200_000, 16)}
    for (_, items), one in found.items():
        assert one.sampled.head < one.blocks.head or not one.sampling_pays
        assert one.num_items == items and one.columns == 512


def test_memory_and_time_by_hand(llamas):
    """At 8,192 tokens, on a device that is limited by its memory in every step."""
    teacher, student = map(outline, llamas)
    found = estimate(teacher, student, 8, 1024, Device("slow memory", 1e20, 1e12))
    logits, head = 8192 * 128_256, 128_256 * 2048
    assert found.tensor.memory == 20 * logits and found.blocks.memory == 4 * 5 * 2**25
    assert found.sampled.head == pytest.approx((2 * logits + 28 * 8192 * 16 * 2048 + 4 * head) / 1e12)
    blocks = -(-logits * 2 // (5 * 2**26))
    assert found.blocks.head == pytest.approx((16 * logits + blocks * 12 * head) / 1e12)
    fast = estimate(teacher, student, 8, 1024, Device("slow products", 1e9, 1e20))
    assert fast.blocks.head / fast.sampled.head == pytest.approx(128_256 / 1040)


@pytest.mark.parametrize(
    ("shape", "task", "items", "classes", "features", "again"),
    [("lm", Task.CAUSAL_LM, 8192, 151_936, 2048, 17), ("classifier", Task.CLASSIFICATION, 1024, 1_000_000, 512, 0)],
)
def test_bytes_are_near_the_counted_ones(shape, task, items, classes, features, again):
    """As benchmarks/accelerator_counts.py counts them; the table of docs/accelerators.md has the exact step.

    The counted step is that of DISLoss. It reads the rows of few classes per item once, and a trainer reads these rows
    again for the gradient.
    """
    model = Outline("m", "M", task, classes, features, 1, 1, False, None)
    found = estimate(model, model, items, 1, Device("memory alone", 1e30, 1e9))
    text = (Path(__file__).parents[2] / "docs" / "accelerators.md").read_text()
    for mode, cost in (("exact", found.blocks), ("sampled", found.sampled)):
        counted = count(SHAPES[shape], "given", row_sparse=False, kernels="triton", mode=mode)
        read_again = 4e-9 * items * again * features if mode == "sampled" else 0
        assert cost.head == pytest.approx(counted["moved_gb"] + read_again, rel=0.15)
        launches = EXACT_LAUNCHES + 8 * BLOCK_LAUNCHES if mode == "exact" else SAMPLED_LAUNCHES
        assert 0.6 * launches <= counted["launches"] <= 1.1 * launches
        row = " | ".join(str(counted[name]) for name in ("launches", "waits", "peak_gb", "moved_gb"))
        assert mode == "sampled" or f"| {shape} | given | exact | triton | {row} |" in text


def test_a_file_of_arguments_and_flags_over_it(llamas, tmp_path, capsys):
    file = tmp_path / "estimate.yaml"
    file.write_text(f"teacher: {llamas[0]}\nstudent: {llamas[1]}\nbatch_size: 2\nsequence_length: 256\n")
    assert main(["estimate", "--config", str(file), "--batch_size", "4"]) == 0
    assert "step      1,024 tokens" in capsys.readouterr().out
    file = tmp_path / "estimate.json"
    file.write_text(json.dumps({"teacher": llamas[0], "student": llamas[1], "batch_size": 2, "sequence_length": 16}))
    assert main(["estimate", f"--config={file}"]) == 0
    assert "step      32 tokens" in capsys.readouterr().out


# Refused


def test_models_that_do_not_exist(llamas, capsys):
    err = told(capsys, "--teacher", "org/absent", "--student", llamas[1])
    assert "'org/absent' cannot be read" in err


def test_configs_without_a_vocabulary_or_labels(saved, llamas, capsys):
    for name, config, architecture in (
        ("base", hf.ViTConfig(), "ViTModel"),
        ("vision", hf.CLIPVisionConfig(), None),
        ("own", hf.LlamaConfig(), "MyOwnForCausalLM"),
    ):
        folder = saved(name, config, architecture)
        err = told(capsys, "--teacher", folder, "--student", llamas[1])
        assert folder in err and ("neither a vocabulary nor labels" in err or "no language model or" in err)


def test_sizes_that_no_model_can_have(saved, llamas, capsys):
    labels = saved("labels", hf.ViTConfig(num_labels=0), "ViTForImageClassification")
    assert "has 0 classes: num_labels or vocab_size" in told(capsys, "--teacher", labels, "--student", llamas[1])
    words = saved("words", hf.BertConfig(vocab_size=0), "BertForMaskedLM")
    err = told(capsys, "--teacher", words, "--student", llamas[1])
    assert "a BertForMaskedLM that cannot be made: " in err and "correct its sizes" in err


def test_models_of_different_tasks_and_classes(saved, llamas, capsys):
    images = [saved(f"vit{n}", hf.ViTConfig(num_labels=n), "ViTForImageClassification") for n in (10, 20)]
    assert "both have to be of one kind" in told(capsys, "--teacher", images[0], "--student", llamas[1])
    assert "has 10 classes, the student" in told(capsys, "--teacher", images[0], "--student", images[1])


def test_arguments_and_files_that_cannot_be_used(llamas, tmp_path, capsys):
    named = ["--teacher", llamas[0], "--student", llamas[1]]
    assert "batch_size is 0" in told(capsys, *named, "--batch_size", "0")
    assert "invalid int value: 'x'" in told(capsys, *named, "--batch_size", "x")
    assert "required: --teacher" in told(capsys, "--student", llamas[1])
    assert "--unknown" in told(capsys, *named, "--unknown", "1")
    assert "cannot be read" in told(capsys, "--config", str(tmp_path / "absent.yaml"))
    for text, said in (
        ("a: [", "cannot be read"),
        ("- 1", "holds a list"),
        ("teecher: x", "arguments that do not exist: teecher; known are"),
    ):
        (tmp_path / "file.yaml").write_text(text)
        assert said in told(capsys, "--config", str(tmp_path / "file.yaml"))
