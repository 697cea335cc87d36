"""Score sentences with the pretrained language model itself."""

from __future__ import annotations

import torch

from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.pairs import MinimalPairs
from sslrun.training.device import Precision


@protocols.register("zero-shot")
class ZeroShot(Protocol):
    """Compare the likelihoods of sentences, with nothing trained.

    The score of a sentence is the sum of its tokens' log-probabilities by the head that the pretext
    task kept: given the tokens before each for a left-to-right model, as in BLiMP (Warstadt et al.,
    TACL 2020, arXiv:1912.00582), and given all others, each hidden in turn, for a masked one
    (pseudo-likelihood; Salazar et al., ACL 2020, arXiv:1910.14659). Special tokens do not count.
    """

    learns = False

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if issubclass(task, MinimalPairs):
            return None
        return (
            f"compares sentences, which the task '{task.name}' does not ask for: "
            "take task: minimal-pairs"
        )

    def refit_obstacle(self) -> str | None:
        return "learns nothing"

    @property
    def precision(self) -> Precision:
        """Full precision, because the sentences of a pair may differ little."""
        return "fp32"

    def check_pretext(self, pretext: Pretext) -> None:
        if not pretext.can_score:
            able = ", ".join(sorted(name for name in pretexts if pretexts[name].can_score))
            raise UserError(
                f"zero-shot needs a pretext task that gives texts a likelihood, which "
                f"'{pretext.name}' does not: take {able}"
            )

    @torch.inference_mode()
    def run(self, bench: Bench) -> Scores:
        """Raises UserError if no head was kept, or if the task does not score texts."""
        kept, task = bench.kept(), bench.task
        assert isinstance(task, MinimalPairs)
        if kept is None:
            raise UserError(
                "zero-shot needs the head of the pretext task, and none was kept beside the "
                "backbone: pretrain with mlm or ltr; runs of earlier versions again, with --fresh"
            )
        pretext = kept.rebuild(bench.backbone()).to(bench.device).eval()
        self.check_pretext(pretext)
        metrics, details = {}, {}
        for split in bench.tests:
            (scores,) = bench.outputs(
                split, lambda batch: (pretext.score_texts(task.inputs(batch)),)
            )
            metrics[split] = bench.score(split, scores)
            details[split] = task.by_phenomenon(scores, bench.examples(split))
        return Scores(metrics, {"accuracy_by_phenomenon": details["test"]})
