"""From a checked Config to objects: the only folder that names concrete classes.

environment  versions, quiet libraries       evaluation       a model outside a run
models       policy, reference, adapter    engines   the engine of a run, its check and journal
rewards      verifier, evaluator           experience  replay, prior policy, hindsight
data         questions of a run            saved_store  the replay buffer of a checkpoint
trainer, run  the trainer; all of it        quickstart/  a toy task and model
"""
