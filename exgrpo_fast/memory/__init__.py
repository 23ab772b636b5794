"""What a run will hold, phase by phase, from its config and the model's shapes: docs/memory.md.

tracing    the passes of a model over fake tensors: what they hold, nothing allocated
training   weights, gradients, optimiser, activations, loss chunk
sharded    the same on one rank of FSDP2
budgets    vLLM's keys and values, the replay buffer
planner    all of it beside the size of the device, as a table; how `auto` is resolved
fit        the plan of this machine or another GPU, and what to change where it does not fit
"""
