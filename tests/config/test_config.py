"""The schema: what it accepts, and one line that names the key for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from exgrpo_fast.config import (
    MAY_CHANGE,
    Config,
    ConfigError,
    all_keys,
    dump_yaml,
    hints,
    load_config,
    recipe_names,
    refuse_other_config,
    validate,
    with_values,
)
from exgrpo_fast.config.docs import other_names, reference


def mistake(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


def override(*pairs: tuple[str, str], recipe: str = "quickstart") -> Config:
    return load_config(recipe, pairs)


def file_mistake(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert "\n" not in message and "run.yaml" in message
    return message


# --- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_validates_and_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert validate(yaml.safe_load(dump_yaml(config))) == config


def test_recipes_are_the_methods_they_are_named_after() -> None:
    grpo, dapo, exgrpo = (load_config(name) for name in ("grpo", "dapo", "exgrpo"))
    assert (grpo.algorithm.advantage, grpo.algorithm.kl.coef) == ("grpo", 0.001)
    assert (grpo.algorithm.aggregation, grpo.replay.enabled) == ("sequence_mean", False)
    assert (dapo.algorithm.clip_low, dapo.algorithm.clip_high) == (0.2, 0.28)
    assert dapo.rollout.dynamic_sampling.enabled and dapo.algorithm.aggregation == "token_mean"
    assert exgrpo.replay.enabled and exgrpo.replay.start_success_rate == 0.35
    assert (exgrpo.replay.experience_ratio, exgrpo.replay.shaping) == (0.5, 0.1)
    assert load_config("dr_grpo").algorithm == exgrpo.algorithm
    eapo = load_config("eapo")
    prior = eapo.prior_resampling
    assert (prior.trigger, prior.threshold, prior.block_tokens) == ("ratio", 0.5, 20)
    assert (prior.augmented_per_group, eapo.rollout.group_size) == (1, 16)
    assert (prior.stop_after_steps, prior.annealing) == (60, "hard")
    assert (prior.positive_only, prior.importance, prior.model) == (True, "sis_token", None)
    assert (eapo.algorithm.clip_low, eapo.algorithm.clip_high) == (0.2, 0.28)


def test_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 1e-6}\nrollout: {group_size: 4}\n")
    config = load_config(str(path))
    assert config.train.lr == 1e-6 and isinstance(config.train.lr, float)  # YAML 1.1: a string
    assert (config.rollout.group_size, config.rollout.prompts_per_step) == (4, 64)


def test_overrides_go_into_nested_sections() -> None:
    config = override(
        ("train.lr", "3e-5"),
        ("replay.enabled", "false"),
        ("algorithm.kl.coef", "0.01"),
        ("rollout.group-size", "4"),
        ("eval.k", "[1, 4]"),
        ("data.train.size", "7"),
        ("data.train.options.max_terms", "5"),
        ("method", "mine"),
    )
    assert (config.train.lr, config.replay.enabled, config.algorithm.kl.coef) == (3e-5, False, 0.01)
    assert (config.rollout.group_size, config.eval.k, config.method) == (4, [1, 4], "mine")
    task, held_out = config.data.train, config.data.eval
    assert not isinstance(task, str | None) and not isinstance(held_out, str | None)
    assert (task.gym, task.size, task.options["max_terms"]) == ("chain_sum", 7, 5)
    assert held_out.size == 300  # the recipe's other task is left alone


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("End with #### and the number", "End with #### and the number"),
        ("Answer: a number", "Answer: a number"),
        ("1e-6", "1e-6"),
        ("'quoted # text'", "quoted # text"),
        ("null", None),
    ],
)
def test_a_text_is_taken_as_it_stands(text: str, value: str | None) -> None:
    assert override(("data.system_prompt", text)).data.system_prompt == value


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("auto", "auto"), ("1e-4", 1e-4)])
def test_off_is_a_word_where_it_is_one_of_the_words(text: str, value: object) -> None:
    assert override(("train.sparsity", text)).train.sparsity == value


def test_a_gym_task_can_take_the_place_of_a_file_and_the_other_way_round() -> None:
    config = override(("data.train", "rows.jsonl"))
    assert config.data.train == "rows.jsonl"
    config = override(("data.train", "rows.jsonl"), ("data.train.gym", "gcd"))
    assert not isinstance(config.data.train, str | None) and config.data.train.gym == "gcd"


# --- misspelt keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "wrong", "right"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"lrr": 1}}, "train.lrr", "train.lr"),
        ({"train": {"group_size": 8}}, "train.group_size", "rollout.group_size"),
        ({"algorithm": {"kl": {"coeff": 1}}}, "algorithm.kl.coeff", "algorithm.kl.coef"),
        ({"data": {"train": {"gymm": "gcd"}}}, "data.train.gymm", "data.train.gym"),
        (
            {"rollout": {"dynamic_sampling": {"enable": True}}},
            "rollout.dynamic_sampling.enable",
            "rollout.dynamic_sampling.enabled",
        ),
    ],
)
def test_a_misspelt_key_names_the_nearest_right_one(tree: dict, wrong: str, right: str) -> None:
    assert mistake(tree) == f"unknown key '{wrong}'; did you mean '{right}'?"


@pytest.mark.parametrize(
    ("tree", "wrong", "ours"),
    [
        ({"num_generations": 8}, "num_generations", "rollout.group_size"),
        ({"train": {"learning_rate": 1}}, "train.learning_rate", "train.lr"),
        ({"rollout": {"n": 8}}, "rollout.n", "rollout.group_size"),
        (
            {"algorithm": {"kl_ctrl": {"kl_coef": 0.1}}},
            "algorithm.kl_ctrl.kl_coef",
            "algorithm.kl.coef",
        ),
        (
            {"actor_rollout_ref": {"actor": {"strategy": "fsdp", "optim": {"lr": 1e-6}}}},
            "actor_rollout_ref.actor.optim.lr",
            "train.lr",
        ),
    ],
)
def test_a_key_of_another_trainer_is_answered_with_ours(tree: dict, wrong: str, ours: str) -> None:
    assert mistake(tree) == f"unknown key '{wrong}'; here it is '{ours}'"


def test_hints_lead_to_keys_and_hide_none() -> None:
    keys = {*all_keys(), "data.train", "data.eval"}
    assert set(hints.FOREIGN.values()) | set(hints.RENAMED.values()) <= keys
    assert (hints.FOREIGN.keys() | hints.RENAMED.keys()) & keys == set()


def test_a_key_that_resembles_none_lists_those_of_its_section() -> None:
    message = mistake({"log": {"zzz": 1}})
    assert message == "unknown key 'log.zzz'; keys there: to, completions_every, updates"


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'exgrop'; did you mean 'exgrpo'"):
        load_config("exgrop")


# --- wrong types and values -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "text", "said"),
    [
        ("train.lr", "fast", "train.lr: input should be a valid number"),
        ("train.lr", "true", "train.lr: expected a value, not true or false"),
        ("algorithm.clip_low", "true", "algorithm.clip_low: expected a value, not true"),
        ("train.lr", ".inf", "train.lr: input should be a finite number"),
        ("train.lr", "0", "train.lr: input should be greater than 0"),
        ("train.max_steps", "2.5", "train.max_steps: input should be a valid integer"),
        ("train.seed", "-1", "train.seed: input should be greater than or equal to 0"),
        ("train.seed", "99999999999999999999", "train.seed: 99999999999999999999 is too large"),
        ("rollout.group_size", "3000000000", "rollout.group_size: 3000000000 is too large"),
        ("reward.workers", "100000", "reward.workers: input should be less than or equal to 1000"),
        ("reward.weights", "[0.0]", "reward.weights are all 0: every reward would be 0"),
        ("train.betas", "[0.9, 1.0]", "train.betas.1: input should be less than 1"),
        ("train.lr.factor", "1", "train.lr: input should be a valid number"),
        ("replay.enabled", "maybe", "replay.enabled: input should be a valid boolean"),
        ("replay.experience_ratio", "1.5", "replay.experience_ratio: input should be less"),
        ("algorithm.surrogate", "ppo", "algorithm.surrogate: input should be 'clip', 'cispo'"),
        ("log.to", "[wandbb]", "log.to.0: input should be 'tensorboard' or 'wandb'"),
        ("reward.functions", "[]", "reward.functions: list should have at least 1 item"),
        ("reward.functions", "exact", "reward.functions: input should be a valid list"),
        ("eval.k", "[]", "eval.k: list should have at least 1 item"),
        ("data.train.size", "many", "data.train.size: input should be a valid integer"),
        ("data.train", "{size: 3}", "data.train.gym is not set"),
        ("data.train", "5", "data.train: input should be a valid string"),
        ("train.lr", "[", "--train.lr: while parsing"),
        ("train.lr", "{a: 1, a: 2}", "--train.lr, line 1: the key 'a' occurs twice"),
        ("train.lr", "!!python/name:os.system", "--train.lr: could not determine a constructor"),
        ("train.sparsity", "on", "train.sparsity: "),
        ("train.sparsity", "1.5", "train.sparsity: "),
        ("train.sparse_tail", "cut", "train.sparse_tail: "),
    ],
)
def test_a_wrong_value_names_its_key(dotted: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override((dotted, text))
    message = str(caught.value)
    assert message.startswith(said) and "\n" not in message


# --- YAML -----------------------------------------------------------------------------------------


def test_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    message = file_mistake(tmp_path, "train:\n  lr: 1e-5\n  max_steps: 3\n  lr: 1e-6\n")
    assert message.endswith(", line 4: the key 'lr' occurs twice")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    said = file_mistake(tmp_path, f"x: !!python/object/apply:os.mkdir ['{trace}']\n")
    assert "could not determine a constructor" in said and not trace.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n", "expected 'key: value' lines, got list"),
        ("", "expected 'key: value' lines, got NoneType"),
        ("a:\n\tb: 1\n", "cannot start any token"),
        ("? [a, b]\n: 1\n", "unhashable key"),
        ("a: 2020-13-45\n", "month must be in 1..12"),
        ("a: *b\n", "undefined alias 'b'"),
    ],
)
def test_malformed_yaml_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in file_mistake(tmp_path, text)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config file nowhere\.yaml: No such file"):
        load_config("nowhere.yaml")


# --- what has to fit together ---------------------------------------------------------------------

GRPO = {"algorithm": {"advantage": "grpo"}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"train": {"minibatches": 3}},
            "rollout.prompts_per_step (64) cannot be split into train.minibatches (3) equal parts; "
            "try 2",
        ),
        (
            GRPO | {"rollout": {"group_size": 1}},
            "rollout.group_size is 1: algorithm.advantage grpo compares at least 2 completions",
        ),
        (
            {"replay": {"enabled": True}, "rollout": {"group_size": 1}},
            "rollout.group_size must be at least 2 when replay.enabled is true",
        ),
        (
            {"reward": {"weights": [1.0, 2.0]}},
            "reward.weights has 2 entries for 1 reward.functions",
        ),
        ({"eval": {"n": 2, "k": [1, 4]}}, "eval.k asks for pass@4 with eval.n = 2"),
        (
            {"train": {"max_tokens_per_microbatch": 100}},
            "train.max_tokens_per_microbatch (100) is below the longest sequence, "
            "data.max_prompt_tokens + rollout.max_completion_tokens = 2560",
        ),
        (
            {"algorithm": {"dual_clip": 3.0, "surrogate": "cispo"}},
            "algorithm.dual_clip belongs to algorithm.surrogate clip, not to cispo; set it to null",
        ),
        (
            {
                "algorithm": {"overlong": {"soft_penalty_tokens": 512}},
                "rollout": {"max_completion_tokens": 256},
            },
            "algorithm.overlong.soft_penalty_tokens (512) is above "
            "rollout.max_completion_tokens (256): every completion would be penalised",
        ),
    ],
)
def test_values_that_contradict_each_other(tree: dict, said: str) -> None:
    assert mistake(tree) == said


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"minibatches": 32}},
        {"rollout": {"group_size": 1}},
        {"eval": {"n": 4, "k": [1, 4]}},
        {"train": {"max_tokens_per_microbatch": 2560}},
        {"reward": {"functions": ["exact", "gsm8k"], "weights": [1.0, 2.0]}},
    ],
)
def test_the_last_values_that_fit(tree: dict) -> None:
    validate(tree)


# --- another config in an old folder --------------------------------------------------------------


def test_what_differs_is_named_unless_it_may_change(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    base = {"rollout": {"prompts_per_step": 4}, "data": {"train": {"gym": "chain_sum"}}}
    saved.write_text(dump_yaml(validate(base)))
    refuse_other_config(tmp_path / "none.yaml", validate(base))
    refuse_other_config(saved, validate(base))
    allowed: dict[str, Any] = {
        "train": {"max_steps": 7, "max_tokens_per_microbatch": 9999},
        "eval": {"n": 2, "k": [1]},
        "checkpoint": {"every": 3},
        "log": {"completions_every": 2},
        "reward": {"workers": 7},
        "replay": {"enabled": True},
    }
    refuse_other_config(saved, validate(base | allowed))
    other = {
        "rollout": {"prompts_per_step": 4, "temperature": 0.5},
        "data": {"train": {"gym": "chain_sum", "options": {"max_terms": 3}}},
        "train": {"lr": 1e-5, "max_steps": 7},
    }
    with pytest.raises(ConfigError) as caught:
        refuse_other_config(saved, validate(other))
    said = str(caught.value)
    assert said.startswith(
        f"--resume: {saved} says data.train.options {{}}, now {{'max_terms': 3}}; "
        f"rollout.temperature 1.0, now 0.5; train.lr 1e-06, now 1e-05. Only "
    )
    assert "train.max_steps" in said and "\n" not in said
    with pytest.raises(ConfigError, match="data.train {'gym'.*, now 'rows.jsonl'"):
        refuse_other_config(saved, validate(base | {"data": {"train": "rows.jsonl"}}))


def test_keys_of_another_version_are_left_aside(tmp_path: Path) -> None:
    tree = validate({}).model_dump(mode="json")
    del tree["train"]["lr"]
    tree["train"]["an_old_key"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    refuse_other_config(tmp_path / "config.yaml", validate({"train": {"lr": 3e-5}}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.allow_mismatch", True),
        ("rollout.sync_tolerance", 0.5),
        ("rollout.kv_cache_gib", 1.0),
        ("rollout.server.deadline_seconds", 600.0),
    ],
)
def test_what_an_error_advises_can_be_changed_on_resume(
    tmp_path: Path, key: str, value: Any
) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(validate({})))
    refuse_other_config(saved, with_values(validate({}), {key: value}))


def test_a_renamed_key_of_an_earlier_run_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    tree = validate({}).model_dump(mode="json")
    tree["model"]["mlp_tile_tokens"] = tree["model"].pop("tile_tokens")
    saved.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        refuse_other_config(saved, validate({}))
    renamed = "model.mlp_tile_tokens is now model.tile_tokens"
    assert str(caught.value) == f"--resume: {saved}: {renamed}; rename it in that file"
    assert mistake(tree) == "unknown key 'model.mlp_tile_tokens'; it is now 'model.tile_tokens'"


def test_some_values_of_a_config_change() -> None:
    config = with_values(load_config("exgrpo"), {"model.lora.rank": 4, "train.lr": 1e-5})
    assert config.model.lora is not None and config.model.lora.rank == 4
    assert (config.train.lr, config.replay) == (1e-5, load_config("exgrpo").replay)
    with pytest.raises(ConfigError, match="train.lr: input should be greater than 0"):
        with_values(config, {"train.lr": 0})


# --- docs/config.md -------------------------------------------------------------------------------


def test_the_page_lists_every_key_as_the_schema_has_it() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text()
    assert page == reference(), "python -m exgrpo_fast.config.docs > docs/config.md"
    gym = {f"data.eval.{name}" for name in ("gym", "size", "seed", "options")}  # as data.train's
    missing = {key for key in all_keys() if f"| `{key}` |" not in page}
    assert missing == gym and "| None |" not in page


def test_the_page_shows_the_names_that_hints_know() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "from-trl-and-verl.md").read_text()
    table = page.partition("## Keys\n")[2]
    assert other_names() in table, "python -m exgrpo_fast.config.docs other-names"
    assert "| `rollout.group_size` | `num_generations` | `actor_rollout_ref.rollout.n` |" in table


def test_every_key_that_may_change_is_there() -> None:
    keys = all_keys()
    for name in MAY_CHANGE:
        assert any(key == name or key.startswith(f"{name}.") for key in keys), name


@pytest.mark.parametrize(("given", "k"), [({}, [1, 8]), ({"n": 2}, [1, 2]), ({"n": 1}, [1])])
def test_passes_that_are_not_named_follow_the_samples(given, k) -> None:
    assert validate({"eval": given}).eval.k == k
    assert (
        load_config("quickstart", [(f"eval.{key}", str(n)) for key, n in given.items()]).eval.k == k
    )
