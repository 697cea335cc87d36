"""Exported runs give the same features in transformers as in sslrun."""

import json

import pytest
import torch

from sslrun.backbones import build_backbone, save_backbone
from sslrun.data.image.images import ImageSpec
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import build_labeled
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.errors import UserError
from sslrun.stages.export import export

WORDS = ["aa", "bb", "cc", "dd", "##x", "."]
TEXTS = (["aa bbx cc.", "dd"], ["cc", "aa aa bb dd."])


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run's folder for a named backbone and returns both."""

    def write(name, **options):
        tokenizer = Tokenizer(
            build_wordpiece(
                True, {entry: number for number, entry in enumerate([*SPECIALS, *WORDS])}
            )
        )
        torch.manual_seed(0)
        backbone = build_backbone(name, options, TextSpec(tokenizer, 16)).eval()
        for parameter in backbone.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        save_backbone(tmp_path / "run/backbone.safetensors", backbone)
        return tmp_path / "run", backbone

    (tmp_path / "run").mkdir()
    return write


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert-tiny", {"positions": 20, "width": 24, "heads": 3}),
        ("bert-tiny", {"positions": 16, "depth": 1, "causal": True}),
        ("gpt-tiny", {"positions": 16}),
    ],
)
def test_transformers_loads_an_exported_run_and_computes_the_same_features(
    name, options, run, tmp_path
):
    transformers = pytest.importorskip("transformers")
    folder, ours = run(name, **options)
    export(folder, tmp_path / "out")
    reference = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    encode = ours.spec.tokenizer.encode
    examples = build_labeled(encode(TEXTS[0]), encode(TEXTS[1]), None, (), ours.spec)
    (batch,) = examples.batches([torch.arange(2)], torch.device("cpu"))
    inputs = tokenizer(*TEXTS, padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == batch.inputs.ids.tolist()
    if name == "bert-tiny":
        assert inputs["token_type_ids"].tolist() == batch.inputs.segments.tolist()
    real = batch.inputs.real
    assert real.tolist() == inputs["attention_mask"].bool().tolist()
    with torch.inference_mode():
        expected, actual = ours(batch.inputs), reference(**inputs)
    torch.testing.assert_close(
        actual.last_hidden_state[real], expected.tokens[real], atol=1e-5, rtol=1e-5
    )
    if name == "bert-tiny" and not options.get("causal"):
        torch.testing.assert_close(actual.pooler_output, expected.pooled, atol=1e-5, rtol=1e-5)


def test_backbones_without_a_counterpart_are_a_one_line_error(run, tmp_path):
    folder, _ = run("bert-tiny", fast=True)
    with pytest.raises(UserError, match="no counterpart of fast: true"):
        export(folder, tmp_path / "out")
    save_backbone(
        folder / "backbone.safetensors", build_backbone("resnet18", {"channels": 4}, ImageSpec(8))
    )
    with pytest.raises(
        UserError, match="needs a backbone with 'export', which 'resnet18' does not offer"
    ):
        export(folder, tmp_path / "out")
    with pytest.raises(UserError, match="nothing: no such file"):
        export(tmp_path / "nothing", tmp_path / "out")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="was not written by sslrun"):
        export(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder, _ = run("bert-tiny")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: can't be written"):
        export(folder, tmp_path / "file")
    (folder / "tokenizer.json").unlink()  # only the weights stay
    export(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 128
