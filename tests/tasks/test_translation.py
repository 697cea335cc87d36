"""The task `translation`: its scores, its learner, and the decoder that it starts from."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sslrun.backbones import build_backbone
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, build_labeled
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.data.text.translation import target_ids
from sslrun.errors import UserError
from sslrun.pretexts.weights import find_kept
from sslrun.protocols.base import unsupported
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.stages.reporting import Reporter
from sslrun.tasks.base import tasks
from sslrun.training.device import compute

sacrebleu = pytest.importorskip("sacrebleu")

WORDS = ("anna", "tom", "the", "ball", "red", "kite", "gave", "lost", ".", "to")
VOCABULARY = {word: place for place, word in enumerate([*SPECIALS, *WORDS])}
SPEC = TextSpec(Tokenizer(build_wordpiece(True, VOCABULARY)), 12)
TOKENIZER = SPEC.tokenizer
TARGETS = ("anna the red ball gave .", "tom the kite lost .", "tom .")
CPU = torch.device("cpu")


def task(**options):
    return tasks["translation"](tasks["translation"].Options(**options), SPEC, ())


def examples():
    sources = TOKENIZER.encode(["anna gave the red ball .", "tom lost the kite .", "tom"])
    labels = target_ids(TOKENIZER.encode(TARGETS), TOKENIZER, SPEC.length)
    return replace(build_labeled(sources, None, labels, (), SPEC), extra=TARGETS)


def batch():
    (only,) = examples().batches([torch.arange(3)], CPU)
    return only


def learner(**options):
    torch.manual_seed(0)
    small = {"depth": 1, "width": 32, "heads": 2, "dropout": 0.0, "std": 0.2}
    return task(**options).learner(build_backbone("bert-tiny", small, SPEC)).eval()


# ---------------------------------------------------------------- scores


def written(*texts):
    return target_ids(TOKENIZER.encode(texts), TOKENIZER, SPEC.length).clamp_min(TOKENIZER.pad)


def test_scores_are_exact_match_and_sacrebleus_chrf():
    texts = ["anna the red ball gave .", "tom the red kite lost .", "anna ."]
    outputs = written(*texts)
    scores = task().score(outputs, examples())
    # The tokenizer writes texts without the space before a full stop.
    ours, theirs = ([text.replace(" .", ".") for text in list_] for list_ in (texts, TARGETS))
    assert scores["exact_match"] == pytest.approx(100 / 3)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score)
    assert task().score(written(*TARGETS), examples()) == {"exact_match": 100, "chrf": 100}


def test_scores_follow_a_subset_and_ignore_what_comes_after_the_end():
    subset = examples().subset(torch.tensor([2, 0]))
    outputs = written(TARGETS[2], TARGETS[0])
    outputs[0, 3:] = 9  # "tom . [SEP]" and then anything
    outputs[1, -1] = TOKENIZER.pad  # no end
    assert task().score(outputs, subset)["exact_match"] == 100


def test_unknown_words_of_the_target_are_never_right():
    unknown = replace(examples(), extra=("anna the green ball gave .", *TARGETS[1:]))
    outputs = written("anna the green ball gave .", *TARGETS[1:])
    assert (outputs == TOKENIZER.unk).any()
    assert task().score(outputs, unknown)["exact_match"] == pytest.approx(200 / 3)


def test_a_missing_package_is_one_line_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'sslrun\[translation\]'"):
        task()


# ---------------------------------------------------------------- the learner


def test_the_loss_is_the_cross_entropy_of_the_next_token():
    network, (inputs, targets) = learner(), task().views(batch(), torch.Generator())
    loss = network((inputs, targets)).loss
    total, count = 0.0, 0
    for row, ids in enumerate(targets.tolist()):
        alone = inputs.subset(torch.tensor([row]))
        length = int(alone.real.sum())  # one sequence without padding
        alone = alone.map(lambda tensor, length=length: tensor[:, :length])
        memory, shared = network.backbone(alone).tokens, network.backbone.embedding
        text = [token for token in ids if token != IGNORED]
        x = network.head(torch.tensor([[TOKENIZER.cls, *text[:-1]]]), memory, shared)
        log_probs = network.head.log_probs(x[0], shared)
        total -= log_probs.gather(1, torch.tensor(text)[:, None]).sum()
        count += len(text)
    torch.testing.assert_close(loss, total / count)


def test_encoder_and_decoder_learn():
    network = learner()
    network(task().views(batch(), torch.Generator())).loss.backward()
    for name, parameter in network.named_parameters():
        if "pool" not in name and "position" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_it_learns_to_write_its_training_texts():
    network = learner().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    views = task().views(batch(), torch.Generator())
    for _ in range(60):
        optimizer.zero_grad()
        network(views).loss.backward()
        optimizer.step()
    outputs = network.eval().predict(batch())
    assert outputs.shape == (3, SPEC.length)
    assert task().score(outputs, examples()) == {"exact_match": 100, "chrf": 100}
    network.task = task(beams=3)
    assert task().score(network.predict(batch()), examples())["exact_match"] == 100


# ---------------------------------------------------------------- protocols and stages


@pytest.mark.parametrize("protocol", ["probe", "lpft", "knn", "attentive", "logistic-regression"])
def test_protocols_without_a_decoder_refuse(protocol):
    reason = unsupported(protocol, tasks["translation"], tasks["translation"].Options())
    assert "'translation'" in reason
    assert protocol == "attentive" or reason.endswith("take finetune or scratch")
    assert "\n" not in reason


@pytest.mark.parametrize("protocol", ["finetune", "scratch"])
def test_protocols_that_train_everything_fit(protocol):
    assert unsupported(protocol, tasks["translation"], tasks["translation"].Options()) is None


RECIPE = {
    "name": "tiny",
    "backbone": {"name": "bert-tiny", "depth": 1, "width": 16, "heads": 2, "positions": 64},
    "data": {"name": "world", "length": 32, "documents": 60, "tokenizer": {"vocab": 200}},
    "pretext": {"name": "denoise", "depth": 1},
    "pretrain": {"steps": 4, "batch": 8, "optimizer": "adamw", "lr": 0.001},
    "watch": {"every": 100, "examples": 64},
    "finetune": {"steps": 1, "batch": 8, "optimizer": "adamw", "lr": 1e-9, "weight_decay": 0},
    "evaluate": {
        "world": {
            "data": {"name": "world-translation", "train": 16, "held_out": 8},
            "task": {"name": "translation", "depth": 1},
            "protocols": ["finetune", "scratch"],
        }
    },
}


def evaluate(root, protocol, **options):
    """Run the cell of a protocol, and return its run's folder and its pretraining's, or None."""
    evaluation = {**RECIPE["evaluate"]["world"]}
    evaluation["task"] = {**evaluation["task"], **options}
    values = {**RECIPE, "evaluate": {"world": evaluation}}
    (cell,) = cells(parse(Located(values, {(): "tiny.yaml:1"})), 0, root, [protocol])
    context = Context(root, compute("cpu"), Reporter(quiet=True))
    if cell.origin.pretraining is not None:
        cell.origin.pretraining.execute(context)
    result = cell.execute(context)
    assert set(result["metrics"]["test"]) == {"exact_match", "chrf"}
    assert json.dumps(result)
    return cell.run.path, cell.origin


def test_fine_tuning_starts_from_the_decoder_of_the_pretext_task(tmp_path):
    def distance(path, origin):
        head = load_file(path / "head.safetensors")
        kept = find_kept(origin.weights).modules["decoder"]
        assert head.keys() == kept.keys()
        return max((head[name] - kept[name]).abs().max().item() for name in head)

    path, origin = evaluate(tmp_path, "finetune")
    assert distance(path, origin) < 1e-6
    lines = (origin.weights.parent / "samples.txt").read_text().splitlines()
    assert len(lines) == 8
    assert all(" -> " in line and "(true: " in line for line in lines)
    assert sum("___" in line for line in lines) >= 5  # a document of one word has no gap
    assert distance(*evaluate(tmp_path, "finetune", decoder="new")) > 0.01
    scratch, initial = evaluate(tmp_path, "scratch")
    assert initial.weights is None
    assert distance(scratch, origin) > 0.01
    with pytest.raises(UserError, match=r"pretext\.safetensors: parameter .*task\.decoder: new"):
        evaluate(tmp_path, "finetune", depth=2)
