"""The Python interface, in the shape of TRL's: `train(...)` and `evaluate(...)` in a script,
a notebook, or under torchrun.

    from exgrpo_fast import train

    def reward(completions, answer, **_):
        return [float(a in c) for c, a in zip(completions, answer)]

    run = train(model="./my-model", train=rows, reward=reward, recipe="exgrpo", max_steps=100)
    run.metrics[-1]["reward_mean"], run.checkpoint, run.report
"""
