"""Guesses at hidden tokens: what is hidden, and that the numbers are the model's own."""

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.backbones.text import embedding_of
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, build_labeled
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.guesses import BEST, HIDDEN, LENGTH, hide_few, list_guesses

MASKED = ("mlm", "gpt-bert", "diffusion", "electra")
TOKENIZER = blank_tokenizer(100)


def build_pretext(name, **options):
    torch.manual_seed(0)
    options = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0, **options}
    network = build_backbone("bert-tiny", options, TextSpec(TOKENIZER, 128))
    return pretexts[name](pretexts[name].Options(), network)


def generator():
    return torch.Generator().manual_seed(0)


def pairs():
    """Return a batch of segment pairs of random words; the last has two words."""
    words = [
        [torch.randint(5, 100, (n,), generator=generator()).tolist() for n in side]
        for side in ((60, 30, 3, 1), (65, 5, 2, 1))
    ]
    texts = build_labeled(*words, torch.zeros(4).long(), ("next",), TextSpec(TOKENIZER, 256))
    (batch,) = texts.batches([torch.arange(4)], torch.device("cpu"))
    return batch


@pytest.mark.parametrize("name", MASKED)
@torch.inference_mode()
def test_masked_models_guess_hidden_tokens(name):
    pretext = build_pretext(name, fast=name == "gpt-bert").eval()
    texts = pretext.guesses(pairs(), generator())
    assert len(texts) == 4
    for text in texts:
        assert len(text.tokens) <= LENGTH
        assert not {"[CLS]", "[SEP]", "[PAD]", "[MASK]"} & set(text.tokens)
        for guess in text.guesses:
            shares = [share for _, share in guess.best]
            assert len(shares) == BEST
            assert shares == sorted(shares, reverse=True)
            assert (text.tokens[guess.place] in dict(guess.best)) == (guess.rank <= BEST)


@torch.inference_mode()
def test_guesses_are_the_probabilities_of_the_head_at_the_hidden_places():
    pretext = build_pretext("mlm").eval()
    batch = pairs()
    views = hide_few(pretext, batch, generator())
    scores = torch.zeros(*views.places.shape, TOKENIZER.vocab)
    first = int(views.targets[0, 0])
    scores[0, 0, first] = 50.0
    text = list_guesses(pretext, views, scores)[0]
    true = TOKENIZER.strings[first]
    assert text.guesses[0].best[0] == (true, 1.0)
    assert (text.guesses[0].rank, text.guesses[0].probability) == (1, 1.0)
    assert text.tokens[text.guesses[0].place] == true
    assert text.guesses[1].rank == TOKENIZER.vocab  # of equal probabilities, the true one is last
    features = pretext.backbone(views.tokens).tokens
    place = int(views.places[0, 0])
    expected = pretext.head(features[0, place], embedding_of(pretext.backbone)).softmax(-1)
    guess = pretext.guesses(batch, generator())[0].guesses[0]
    assert guess.probability == pytest.approx(float(expected[first]), abs=1e-4)


def test_only_words_of_the_beginning_are_hidden_and_short_texts_have_fewer():
    pretext = build_pretext("mlm")
    batch = pairs()
    views = hide_few(pretext, batch, generator())
    counts = (views.targets != IGNORED).sum(dim=1).tolist()
    assert counts == [HIDDEN, HIDDEN, HIDDEN, 2]
    assert int(views.places[views.targets != IGNORED].max()) < LENGTH
    hidden = views.tokens.ids == TOKENIZER.mask
    assert hidden.sum(dim=1).tolist() == counts
    texts = list_guesses(pretext, views, torch.zeros(*views.places.shape, TOKENIZER.vocab))
    assert [len(text.guesses) for text in texts] == counts
    words = batch.inputs.ids[3][pretext.words(batch.inputs)[3]].tolist()
    assert texts[3].tokens == [TOKENIZER.strings[word] for word in words]


def test_other_tasks_on_text_guess_nothing():
    pretext = build_pretext("ltr", causal=True)
    assert pretext.guesses(pairs(), generator()) == []
