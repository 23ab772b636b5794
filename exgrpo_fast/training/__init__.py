"""The step: collect groups, update the policy, evaluate."""
