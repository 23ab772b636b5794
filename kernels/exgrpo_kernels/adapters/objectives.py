"""Policy losses of other trainers' interfaces, as one call of `exgrpo_kernels.policy_loss`."""

from collections.abc import Mapping
from dataclasses import fields

from exgrpo_kernels import PolicyObjective


def objective_from(settings: Mapping[str, object]) -> PolicyObjective:
    """Keyword settings of a config file -> `PolicyObjective`; ValueError names an unknown one."""
    known = {f.name for f in fields(PolicyObjective)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"PolicyObjective has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    return PolicyObjective(**settings)  # type: ignore[arg-type]
