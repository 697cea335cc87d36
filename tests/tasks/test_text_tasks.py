"""Tasks on text: readouts, the BiLSTM, tags at the first piece of a word, regression."""

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
    words = [torch.randint(5, 60, (length,), generator=draw).tolist() for length in sizes]
    return build_labeled(words, None, torch.tensor(labels), ("a", "b", "c"), SPEC)


def batch(examples):
    (only,) = examples.batches([torch.arange(len(examples))], CPU)
    return only


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny"])
def test_each_readout_equals_its_definition(name):
    network, inputs = backbone(name).eval(), batch(texts())
    with torch.no_grad():
        features = network(inputs.inputs)
        positions = [0] * 4 if name == "bert-tiny" else [8, 5, 13, 3]
        assert features.read.tolist() == positions
        rows = torch.arange(4)
        assert torch.equal(task(pool="cls").readout(features), features.tokens[rows, features.read])
        mean = torch.stack(
            [
                row[: length + 2].mean(dim=0)
                for row, length in zip(features.tokens, (7, 4, 12, 2), strict=True)
            ]
        )
        torch.testing.assert_close(task(pool="mean").readout(features), mean)
        last_four = torch.cat([layer[rows, features.read] for layer in features.layers[1:]], dim=1)
        assert torch.equal(task(pool="last4").readout(features), last_four)
        assert task(pool="last4").head(16, 5).in_features == 64
        assert torch.equal(task().readout(features), features.pooled)
        if name == "bert-tiny":
            torch.testing.assert_close(
                features.pooled, torch.tanh(network.pooler(features.tokens[:, 0]))
            )
        mixture = task(pool="mixture")
        head = mixture.head(16, network.depth).eval()
        head.mix.weights.data = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
        head.mix.scale.data = torch.tensor(3.0)
        shares = head.mix.weights.softmax(0)
        mixed = 3 * sum(
            share * layer[rows, features.read]
            for share, layer in zip(shares, features.layers, strict=True)
        )
        torch.testing.assert_close(head(mixture.readout(features)), head.linear(mixed))
    assert task().linear
    assert not mixture.linear
    assert ScalarMix(3)((torch.ones(1), torch.ones(1), torch.full((1,), 4.0))).item() == 2


def test_heads_are_one_linear_map_after_dropout():
    head = task(dropout=0.5).head(16)
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(3, 16), (3,)]
    x = torch.ones(500, 16)
    torch.manual_seed(0)
    assert head.train()(x).std(dim=0).min() > 0
    assert torch.equal(head.eval()(x), F.linear(x, head.weight, head.bias))


@pytest.mark.parametrize("name", ["sentences", "span", "tagging"])
@pytest.mark.parametrize(
    "shape", [{}, {"bilstm": True}, {"bilstm": 2}, {"pool": "mixture", "bilstm": True}]
)
def test_padding_does_not_change_a_heads_outputs(name, shape):
    tagger, network = task(name, **shape), backbone().eval()
    torch.manual_seed(1)
    head = tagger.head(network.width, network.depth).eval()
    examples = texts()
    with torch.no_grad():
        outputs = head(tagger.readout(network(batch(examples).inputs)))
        for row in range(4):
            alone = head(
                tagger.readout(network(batch(examples.subset(torch.tensor([row]))).inputs))
            )
            length = alone.shape[1]
            expected = outputs[row] if name == "sentences" else outputs[row, :length]
            torch.testing.assert_close(alone[0], expected, rtol=1e-4, atol=1e-5)
            if name != "sentences":
                assert (outputs[row, length:] == float("-inf")).all()


def test_the_bilstm_is_random_and_sees_both_sides_of_a_causal_backbone():
    span_task, network = task("span", bilstm=True), backbone(causal=True).eval()
    torch.manual_seed(1)
    head = span_task.head(16).eval()
    ids = torch.randint(5, 60, (1, 10), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] - 4) % 50 + 5
    outputs = []
    with torch.no_grad():
        for tokens in (ids, changed):
            inputs = batch(build_labeled([tokens[0].tolist()], None, None, (), SPEC)).inputs
            outputs.append(head(span_task.readout(network(inputs))))
            plain = task("span").head(16).eval()
    assert (outputs[0][0, 2] - outputs[1][0, 2]).abs().max() > 1e-6  # a position before the change
    assert plain.bilstm is None
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"bilstm", "linear"}
    assert head.linear.in_features == 32
    # A sequence is read at its last token by the forward LSTM, at its first by the backward one.
    sequence_head = task(bilstm=True).head(16).eval()
    features = network(batch(texts()).inputs)
    ahead, back = features.tokens, features.tokens
    with torch.no_grad():
        for row, length in enumerate((9, 6, 14, 4)):
            expected = torch.cat(
                [
                    sequence_head.bilstm.ahead[0](ahead[row : row + 1, :length])[-1][0, -1],
                    sequence_head.bilstm.back[0](back[row : row + 1, :length].flip(1))[-1][0, -1],
                ]
            )
            torch.testing.assert_close(
                sequence_head(features)[row], sequence_head.linear(expected), rtol=1e-4, atol=1e-5
            )


def test_the_bilstm_equals_torchs_and_has_the_backbones_width():
    bilstm = task("span", bilstm=2, pool="last4", dropout=0.0).head(16, 5).bilstm
    reference = torch.nn.LSTM(64, 16, 2, batch_first=True, bidirectional=True)
    weights = {
        f"{name}_l{layer}{suffix}": getattr(cells[layer].cells[0], f"{name}_l0")
        for suffix, cells in (("", bilstm.ahead), ("_reverse", bilstm.back))
        for layer in range(2)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    reference.load_state_dict(weights)
    x = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = torch.cat(bilstm(x, torch.ones(3, 9, dtype=torch.bool)), dim=-1)
        torch.testing.assert_close(states, reference(x)[0])


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny", "lstm"])
@pytest.mark.parametrize(
    "options", [{}, {"bilstm": 1}, {"pool": "last4"}, {"pool": "mixture"}, {"pool": "mean"}]
)
def test_every_readout_learns(name, options):
    if name == "lstm" and options.get("pool") == "last4":
        options = {"pool": "cls"}
    torch.manual_seed(0)
    learner = TaskLearner(backbone(name), task(dropout=0.0, **options))
    examples = texts()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.01)
    losses = []
    while len(losses) < 60 and (not losses or losses[-1] > 0.3 * losses[0]):
        output = learner(learner.views(batch(examples), torch.Generator()))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert isinstance(output, Output)
    assert losses[-1] < 0.5 * losses[0], losses
    assert learner.task.score(learner.eval().predict(batch(examples)), examples)["accuracy"] >= 75


def test_span_loss_is_the_mean_of_start_and_end():
    span_task = task("span")
    outputs = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[1, 2], [0, 0], [6, 6]])
    log_probabilities = outputs.log_softmax(dim=1)
    expected = (
        -sum(
            log_probabilities[row, first, 0] + log_probabilities[row, last, 1]
            for row, (first, last) in enumerate(targets.tolist())
        )
        / 6
    )
    assert span_task.loss(outputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------- tagging


def build_tagged():
    """Return three sentences; the second is truncated, and its words have several pieces."""
    pieces = [
        [10, 11, 12],
        [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39],
        [40],
    ]
    word_starts = [[0, 2], list(range(0, 20, 2)), [0]]  # positions at which words begin
    words = [["B-X", "O"], ["B-X", "I-X", *["O"] * 7, "B-Y"], ["B-Y"]]
    classes = ("B-X", "B-Y", "I-X", "O")
    labels = []
    for ids, starts, tags in zip(pieces, word_starts, words, strict=True):
        remaining = iter(tags)
        labels += [
            classes.index(next(remaining)) if position in starts else IGNORED
            for position in range(len(ids))
        ]
    tokens, offsets = concatenate_texts(pieces)
    zeros = torch.zeros(3, dtype=torch.int64)
    ranges = trim_ranges(torch.stack([offsets[:-1], offsets[1:], zeros, zeros], dim=1), 20)
    return Sequences(tokens, ranges, None, classes, SPEC, torch.tensor(labels), TagSet(words))


def perfect_outputs(examples):
    labels = batch(examples).labels
    return F.one_hot(labels.clamp_min(0), 4).float()


def test_tags_are_read_at_first_pieces_and_truncated_words_count_as_outside():
    tagging, examples = task("tagging", ("B-X", "B-Y", "I-X", "O")), build_tagged()
    # Three of the four entities can be predicted: the last one of the long sentence is truncated.
    scores = tagging.score(perfect_outputs(examples), examples)
    assert scores["precision"] == 100
    assert scores["recall"] == 75
    assert scores["accuracy"] == pytest.approx(100 * 12 / 13)
    subset = examples.subset(torch.tensor([2, 0]))
    assert tagging.score(perfect_outputs(subset), subset)["f1"] == 100
    outputs_of_subset = perfect_outputs(subset)
    outputs_of_subset[1, 2] = torch.tensor([9.0, 0, 0, 0])  # later pieces are ignored
    assert tagging.score(outputs_of_subset, subset)["f1"] == 100
    labels = batch(examples).labels
    outputs = torch.randn(*labels.shape, 4, generator=torch.Generator().manual_seed(0))
    is_target = labels != IGNORED
    assert tagging.loss(outputs, labels).item() == pytest.approx(
        F.cross_entropy(outputs[is_target], labels[is_target]).item()
    )
    assert is_target.sum() == 2 + 9 + 1
    # Tags without entities, such as parts of speech, are scored by accuracy.
    assert tagging.primary.name == "f1"
    assert task("tagging", ("NN", "O", "VB")).primary.name == "accuracy"


def test_outputs_of_several_batches_are_stacked():
    tagging, examples = task("tagging", ("B-X", "B-Y", "I-X", "O")), build_tagged()
    parts = [perfect_outputs(examples.subset(torch.tensor([row]))) for row in range(3)]
    assert tagging.score(concatenate_outputs(parts), examples)["precision"] == 100


def test_outputs_keep_the_order_of_examples_batched_by_length():
    examples, batches = build_tagged(), []
    (outputs,) = outputs_of(
        examples,
        lambda raw: batches.append(raw) or (raw.inputs.ids[:, 1:2].float(),),
        torch.device("cpu"),
        2,
    )
    assert outputs[:, 0].tolist() == batch(examples).inputs.ids[:, 1].tolist()
    longest = [int(raw.inputs.real.sum(dim=1).max()) for raw in batches]
    assert longest == sorted(longest)
    assert len(longest) == 2
    assert longest[0] < longest[1]


# ---------------------------------------------------------------- metrics and errors


def test_regression_uses_squared_error_and_is_scored_by_correlation():
    regression = task(classes=())
    outputs, truth = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0.0, 1.0, 5.0])
    assert regression.loss(outputs, truth).item() == pytest.approx((1 + 4 + 9) / 3)
    assert set(regression.measure(outputs, truth)) == {"spearman", "pearson"}
    assert regression.primary.name == "spearman"
    assert regression.head(16).out_features == 1
    assert not regression.linear


def test_unsuitable_metrics_are_rejected():
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


def test_too_few_layers_for_a_readout_are_reported():
    shallow = backbone("lstm")  # three layers, including the embeddings
    features = shallow(batch(texts()).inputs)
    assert isinstance(features, Features)
    assert len(features.layers) == 3
    for text_task in (
        task(pool="last4"),
        task(pool="last4", bilstm=True),
        *(task(name, pool="last4") for name in ("span", "tagging")),
    ):
        with pytest.raises(UserError, match="pool last4 reads 4 layers, but the backbone has 3"):
            text_task.head(shallow.width, shallow.depth)
