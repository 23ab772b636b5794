"""From a checked Config to objects: the only folder that names concrete classes.

run          all of a training run              assembly     the trainer and its parts
models       policy, reference, adapter         engines, servers  the rollout engine, its check, journal
rewards      reward pool, verifier, evaluator   experience   replay, prior policy, hindsight
data         questions of a run                 evaluated_model  a model outside a run
saved_store  the replay buffer of a checkpoint  environment  versions and fingerprints
quickstart/  a toy task and model               pretrained/  GGUF files and packaged models
before_torch folder and rows, at once           folder       what a model's folder says
"""
