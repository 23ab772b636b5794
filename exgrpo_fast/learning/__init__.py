"""From judged groups to changed weights.

learner      groups -> advantages -> columns -> packs -> fused loss -> optimiser
advantages   of each response in its group      weighting   of tokens of other policies
reference    the frozen policies of a KL term   update_report   what an update did
optim        clipping, guards, schedules        adamw   in three sizes
gradient_release   an update without all gradients at once
"""
