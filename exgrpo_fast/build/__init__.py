"""From a checked Config to objects: the only folder that names concrete classes.

environment  versions, quiet libraries       evaluation       a model outside a run
models       policy, reference, adapter    engines, rollouts  the engine of a run and its journal
rewards      verifiers and evaluation      experience         replay, prior policy, hindsight
data         questions of a run            trainer, run       the trainer; all of it for one run
quickstart/  a toy task and model made on the spot
"""
