"""A backbone of one's own that decides on actions."""

POLICY = '''
"""A linear policy."""

from torch import nn

from sslrun.backbones.base import Backbone, Features, backbones
from sslrun.backbones.control import ControlBackbone
from sslrun.registry import Options


class Policy(ControlBackbone):
    """A linear map from the state and what is asked for to the action."""

    Options = Options
    takes, offers = ControlBackbone.takes, frozenset({"actions"})

    def __init__(self, options, spec):
        super().__init__(options, spec)
        self.width = 8
        self.states, self.asked = nn.Linear(spec.states, 8), nn.Linear(1, 8)
        self.action_head = nn.Linear(8, spec.actions)

    def forward(self, inputs):
        asked = self.asked(inputs.returns[..., None] / self.spec.scale)
        tokens = self.states(inputs.states) + self.conditions[0] * asked
        return Features(tokens.mean(dim=1), tokens, mask=inputs.real)

    def predict_actions(self, features):
        return self.action_head(features.tokens)


backbones.register("policy")(Policy)


@backbones.register("pretender")
class Pretender(Backbone):
    """Offers actions, but does not have what they need."""

    Options = Options
    takes, offers = Policy.takes, Policy.offers
'''

RECIPE = """
name: policy
backbone: policy
pretext: actions
data: {name: paths, trajectories: 20}
pretrain: {steps: 2, batch: 8}
evaluate:
  paths: {protocols: [rollout], rollout: {episodes: 2}}
"""


def test_a_backbone_that_decides_is_rolled_out(outside, result, tmp_path):
    (tmp_path / "mine.py").write_text(POLICY)
    (tmp_path / "policy.yaml").write_text(RECIPE)
    outside("sweep", "policy.yaml", "--import", "mine.py")
    rollout, _ = result("rollout")
    assert [one["target"] for one in rollout["rollouts"]] == ["best", "mean", "beyond"]
    words = ("--import", "mine.py", "--set", "backbone=pretender")
    printed = outside("sweep", "policy.yaml", *words, code=2)
    assert "pretext 'actions': 'pretender' offers 'actions', but its class is no Con" in printed
    assert "Traceback" not in printed
    words = ("--import", "mine.py", "--set", "backbone=pretender", "--set", "pretext=null")
    printed = outside("sweep", "policy.yaml", *words, code=2)
    assert "rollout: 'pretender' offers 'actions', but its class is no ControlBackbone" in printed
