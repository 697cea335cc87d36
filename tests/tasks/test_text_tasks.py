"""Tasks on text: what each head reads, the BiLSTM between, tags told at a word's first piece, regression."""

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Features
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import (
    IGNORED,
    Sequences,
    build_labeled,
    concatenate_texts,
    trim_ranges,
)
from sslrun.data.text.tags import TagSet
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError
from sslrun.tasks.base import TaskLearner, concatenate_outputs, outputs_of, tasks
from sslrun.tasks.text import ScalarMix
from sslrun.training.learner import Output

SPEC = TextSpec(blank_tokenizer(60), 20)
CPU = torch.device("cpu")


def task(name="sentences", classes=("a", "b", "c"), **options):
    return tasks[name](tasks[name].Options(**options), SPEC, classes)


def backbone(name="bert-tiny", **options):
    torch.manual_seed(0)
    small = (
        {"depth": 4, "width": 16, "dropout": 0.0}
        if name != "lstm"
        else {"width": 16, "dropout": 0.0}
    )
    return build_backbone(name, {**small, **options}, SPEC)


def texts(sizes=(7, 4, 12, 2), labels=(0, 1, 2, 1)):
    draw = torch.Generator().manual_seed(0)
    words = [torch.randint(5, 60, (size,), generator=draw).tolist() for size in sizes]
    return build_labeled(words, None, torch.tensor(labels), ("a", "b", "c"), SPEC)


def batch(examples):
    (only,) = examples.batches([torch.arange(len(examples))], CPU)
    return only


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny"])
def test_each_readout_is_what_it_says(name):
    network, given = backbone(name).eval(), batch(texts())
    with torch.no_grad():
        found = network(given.inputs)
        read = [0] * 4 if name == "bert-tiny" else [8, 5, 13, 3]
        assert found.read.tolist() == read
        rows = torch.arange(4)
        assert torch.equal(task(pool="cls").readout(found), found.tokens[rows, found.read])
        mean = torch.stack(
            [
                row[: size + 2].mean(dim=0)
                for row, size in zip(found.tokens, (7, 4, 12, 2), strict=True)
            ]
        )
        torch.testing.assert_close(task(pool="mean").readout(found), mean)
        four = torch.cat([layer[rows, found.read] for layer in found.layers[1:]], dim=1)
        assert torch.equal(task(pool="last4").readout(found), four)
        assert task(pool="last4").head(16, 5).in_features == 64
        assert torch.equal(task().readout(found), found.pooled)
        if name == "bert-tiny":
            torch.testing.assert_close(found.pooled, torch.tanh(network.pooler(found.tokens[:, 0])))
        mixture = task(pool="mixture")
        head = mixture.head(16, network.depth).eval()
        head.mix.weights.data = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
        head.mix.scale.data = torch.tensor(3.0)
        shares = head.mix.weights.softmax(0)
        mixed = 3 * sum(
            share * layer[rows, found.read]
            for share, layer in zip(shares, found.layers, strict=True)
        )
        torch.testing.assert_close(head(mixture.readout(found)), head.linear(mixed))
    assert task().linear
    assert not mixture.linear
    assert ScalarMix(3)((torch.ones(1), torch.ones(1), torch.full((1,), 4.0))).item() == 2


def test_heads_are_one_linear_map_after_dropout():
    head = task(dropout=0.5).head(16)
    assert [tuple(each.shape) for each in head.parameters()] == [(3, 16), (3,)]
    x = torch.ones(500, 16)
    torch.manual_seed(0)
    assert head.train()(x).std(dim=0).min() > 0
    assert torch.equal(head.eval()(x), F.linear(x, head.weight, head.bias))


@pytest.mark.parametrize("name", ["sentences", "span", "tagging"])
@pytest.mark.parametrize(
    "shape", [{}, {"bilstm": True}, {"bilstm": 2}, {"pool": "mixture", "bilstm": True}]
)
def test_padding_does_not_change_what_a_head_gives(name, shape):
    made, network = task(name, **shape), backbone().eval()
    torch.manual_seed(1)
    head = made.head(network.width, network.depth).eval()
    given = texts()
    with torch.no_grad():
        together = head(made.readout(network(batch(given).inputs)))
        for row in range(4):
            alone = head(made.readout(network(batch(given.subset(torch.tensor([row]))).inputs)))
            size = alone.shape[1]
            mine = together[row] if name == "sentences" else together[row, :size]
            torch.testing.assert_close(alone[0], mine, rtol=1e-4, atol=1e-5)
            if name != "sentences":
                assert (together[row, size:] == float("-inf")).all()


def test_the_bilstm_is_random_and_sees_both_sides_of_a_causal_backbone():
    made, network = task("span", bilstm=True), backbone(causal=True).eval()
    torch.manual_seed(1)
    head = made.head(16).eval()
    ids = torch.randint(5, 60, (1, 10), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[0, 7] = (ids[0, 7] - 4) % 50 + 5
    told = []
    with torch.no_grad():
        for each in (ids, other):
            inputs = batch(build_labeled([each[0].tolist()], None, None, (), SPEC)).inputs
            told.append(head(made.readout(network(inputs))))
            plain = task("span").head(16).eval()
    assert (told[0][0, 2] - told[1][0, 2]).abs().max() > 1e-6  # a place before the change
    assert plain.bilstm is None
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"bilstm", "linear"}
    assert head.linear.in_features == 32
    # A whole sequence: the forward half at its last token, the backward half at its first.
    whole = task(bilstm=True).head(16).eval()
    features = network(batch(texts()).inputs)
    ahead, back = features.tokens, features.tokens
    with torch.no_grad():
        for row, size in enumerate((9, 6, 14, 4)):
            expected = torch.cat(
                [
                    whole.bilstm.ahead[0](ahead[row : row + 1, :size])[-1][0, -1],
                    whole.bilstm.back[0](back[row : row + 1, :size].flip(1))[-1][0, -1],
                ]
            )
            torch.testing.assert_close(
                whole(features)[row], whole.linear(expected), rtol=1e-4, atol=1e-5
            )


def test_the_bilstm_is_torchs_of_the_backbones_width_whatever_it_reads():
    made = task("span", bilstm=2, pool="last4", dropout=0.0).head(16, 5).bilstm
    theirs = torch.nn.LSTM(64, 16, 2, batch_first=True, bidirectional=True)
    weights = {
        f"{name}_l{layer}{mark}": getattr(cells[layer].cells[0], f"{name}_l0")
        for mark, cells in (("", made.ahead), ("_reverse", made.back))
        for layer in range(2)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    theirs.load_state_dict(weights)
    x = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = torch.cat(made(x, torch.ones(3, 9, dtype=torch.bool)), dim=-1)
        torch.testing.assert_close(found, theirs(x)[0])


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny", "lstm"])
@pytest.mark.parametrize(
    "options", [{}, {"bilstm": 1}, {"pool": "last4"}, {"pool": "mixture"}, {"pool": "mean"}]
)
def test_every_readout_learns(name, options):
    if name == "lstm" and options.get("pool") == "last4":
        options = {"pool": "cls"}
    torch.manual_seed(0)
    learner = TaskLearner(backbone(name), task(dropout=0.0, **options))
    given = texts()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.01)
    losses = []
    while len(losses) < 60 and (not losses or losses[-1] > 0.3 * losses[0]):
        output = learner(learner.views(batch(given), torch.Generator()))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert isinstance(output, Output)
    assert losses[-1] < 0.5 * losses[0], losses
    assert learner.task.score(learner.eval().predict(batch(given)), given)["accuracy"] >= 75


def test_span_loss_is_the_mean_of_start_and_end():
    made = task("span")
    outputs = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[1, 2], [0, 0], [6, 6]])
    known = outputs.log_softmax(dim=1)
    expected = (
        -sum(
            known[at, first, 0] + known[at, last, 1]
            for at, (first, last) in enumerate(targets.tolist())
        )
        / 6
    )
    assert made.loss(outputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------- tagging


def tagged():
    """Three sentences, of which the second is cut; its words have several pieces."""
    pieces = [
        [10, 11, 12],
        [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39],
        [40],
    ]
    first = [[0, 2], list(range(0, 20, 2)), [0]]  # where a word begins
    words = [["B-X", "O"], ["B-X", "I-X", *["O"] * 7, "B-Y"], ["B-Y"]]
    classes = ("B-X", "B-Y", "I-X", "O")
    labels = []
    for ids, begins, tags in zip(pieces, first, words, strict=True):
        told = iter(tags)
        labels += [classes.index(next(told)) if at in begins else IGNORED for at in range(len(ids))]
    tokens, offsets = concatenate_texts(pieces)
    none = torch.zeros(3, dtype=torch.int64)
    ranges = trim_ranges(torch.stack([offsets[:-1], offsets[1:], none, none], dim=1), 20)
    return Sequences(tokens, ranges, None, classes, SPEC, torch.tensor(labels), TagSet(words))


def perfect(examples):
    labels = batch(examples).labels
    return F.one_hot(labels.clamp_min(0), 4).float()


def test_tags_are_told_at_the_first_piece_and_words_that_were_cut_off_are_outside():
    made, given = task("tagging", ("B-X", "B-Y", "I-X", "O")), tagged()
    # Of the four entities three can be told: the last one of the long sentence was cut off.
    found = made.score(perfect(given), given)
    assert found["precision"] == 100
    assert found["recall"] == 75
    assert found["accuracy"] == pytest.approx(100 * 12 / 13)
    some = given.subset(torch.tensor([2, 0]))
    assert made.score(perfect(some), some)["f1"] == 100
    wrong = perfect(some)
    wrong[1, 2] = torch.tensor([9.0, 0, 0, 0])  # a later piece says nothing
    assert made.score(wrong, some)["f1"] == 100
    labels = batch(given).labels
    outputs = torch.randn(*labels.shape, 4, generator=torch.Generator().manual_seed(0))
    known = labels != IGNORED
    assert made.loss(outputs, labels).item() == pytest.approx(
        F.cross_entropy(outputs[known], labels[known]).item()
    )
    assert known.sum() == 2 + 9 + 1
    # Tags that mark no entities, as parts of speech, have no entities to be scored by.
    assert made.primary.name == "f1"
    assert task("tagging", ("NN", "O", "VB")).primary.name == "accuracy"


def test_outputs_of_several_batches_are_stacked():
    made, given = task("tagging", ("B-X", "B-Y", "I-X", "O")), tagged()
    parts = [perfect(given.subset(torch.tensor([at]))) for at in range(3)]
    assert made.score(concatenate_outputs(parts), given)["precision"] == 100


def test_outputs_come_in_the_order_of_the_examples_though_like_lengths_run_together():
    given, seen = tagged(), []
    (found,) = outputs_of(
        given,
        lambda raw: seen.append(raw) or (raw.inputs.ids[:, 1:2].float(),),
        torch.device("cpu"),
        2,
    )
    assert found[:, 0].tolist() == batch(given).inputs.ids[:, 1].tolist()
    longest = [int(raw.inputs.real.sum(dim=1).max()) for raw in seen]
    assert longest == sorted(longest)
    assert len(longest) == 2
    assert longest[0] < longest[1]


# ---------------------------------------------------------------- metrics and mistakes


def test_numbers_are_learned_by_their_squared_error_and_scored_by_correlation():
    made = task(classes=())
    outputs, truth = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0.0, 1.0, 5.0])
    assert made.loss(outputs, truth).item() == pytest.approx((1 + 4 + 9) / 3)
    assert set(made.measure(outputs, truth)) == {"spearman", "pearson"}
    assert made.primary.name == "spearman"
    assert made.head(16).out_features == 1
    assert not made.linear


def test_metrics_that_do_not_fit_are_refused():
    assert task(classes=("a", "b"), metric="f1").primary.name == "f1"
    assert set(task(classes=("a", "b")).measure(torch.eye(2), torch.tensor([0, 1]))) == {
        "accuracy", "macro_f1", "matthews", "f1"
    }  # fmt: skip
    for classes, metric, words in (
        ((), "accuracy", "spearman is for numbers"),
        (("a", "b"), "spearman", "spearman is for numbers"),
        (("a", "b", "c"), "f1", "there are 3: take macro_f1"),
    ):
        with pytest.raises(UserError, match=words):
            task(classes=classes, metric=metric)


def test_layers_that_a_backbone_does_not_have_are_not_read_in_silence():
    shallow = backbone("lstm")  # three layers, the embedded one among them
    features = shallow(batch(texts()).inputs)
    assert isinstance(features, Features)
    assert len(features.layers) == 3
    for made in (
        task(pool="last4"),
        task(pool="last4", bilstm=True),
        *(task(name, pool="last4") for name in ("span", "tagging")),
    ):
        with pytest.raises(UserError, match="pool last4 reads 4 layers, but the backbone has 3"):
            made.head(shallow.width, shallow.depth)
