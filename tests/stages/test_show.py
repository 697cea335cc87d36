"""Every registered component can be shown."""

import pytest

from sslrun import cli  # noqa: F401 (registers all components)
from sslrun.registry import Registry
from sslrun.stages.show import describe


@pytest.mark.parametrize("kind", sorted(Registry.kinds))
def test_every_component_is_described_with_its_options(kind):
    for name in Registry.kinds[kind]:
        shown = describe(kind, name)
        assert shown["about"], name
        assert all(option["about"] for option in shown["options"]), name
