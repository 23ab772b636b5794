"""What processes tell each other, which packs each gets, and what they cannot do together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exit_code
from forked import run_forked
from several_processes import SECONDS, environment, run_processes
from torch.distributed import TCPStore

from exgrpo_fast.config import ConfigError, refuse_world_size, validate
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.process_group import SINGLE_PROCESS
from exgrpo_fast.core.torchrun import RankInfo, place_of, refuse_missing_address
from exgrpo_fast.model.packing import Ragged, pack
from exgrpo_fast.model.sharded_policy import assign_packs


def test_what_they_tell_each_other() -> None:
    reports = run_processes(2, Path(__file__).with_name("processes_worker.py"))
    for rank, report in enumerate(reports):
        assert report["broadcast"] == {"rank": 0, "text": "ä", "tiny": 1e-300}
        assert report["gathered"] == ["", "x"]
        assert report["all_reduce_max"] == 1.0
        assert report["made"] == 7
        assert report["calls"] == ([0] if rank == 0 else [])
        assert report["failed"] == ("KeyError" if rank == 0 else "MainRankFailed")
        assert report["strayed"].startswith("step 3: the processes differ in loss: 0.0, 0.5;")


def test_a_restart_does_not_meet_the_ranks_of_the_attempt_before(tmp_path: Path) -> None:
    """torchrun keeps the store; rank 0, late, has yet to replace its address of the first attempt."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    worker = str(Path(__file__).with_name("meeting_worker.py"))
    for late in ("0", "2"):
        ranks = [{"RANK": str(rank)} for rank in range(2)]
        ended = run_forked(
            [[worker, late if rank == 0 else "0"] for rank in range(2)],
            folder=tmp_path,
            environments=[environment() | meeting | rank for rank in ranks],
            seconds=SECONDS,
        )
        assert [process.stdout for process in ended] == ["[0, 1]\n"] * 2, ended[1].stderr[-2000:]


def test_one_alone_talks_to_nobody() -> None:
    value = object()
    assert (
        SINGLE_PROCESS.broadcast(value) is value
        and SINGLE_PROCESS.run_on_rank0(lambda: value) is value
    )
    assert SINGLE_PROCESS.gather(value) == [value] and SINGLE_PROCESS.all_reduce_max(3.0) == 3.0
    assert torch.equal(SINGLE_PROCESS.all_reduce_sum_(torch.ones(2)), torch.ones(2))
    SINGLE_PROCESS.require_same("step 1", {"loss": 1.0})


def test_torchrun_says_which_process_this_is() -> None:
    assert place_of({}) == RankInfo(0, 1, 0)
    started = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    assert place_of(started) == RankInfo(9, 16, 1)
    with pytest.raises(UserError, match="RANK, WORLD_SIZE and LOCAL_RANK of the environment: "):
        place_of(started | {"RANK": "nine"})
    with pytest.raises(UserError, match="start the processes with torchrun"):
        refuse_missing_address(started | {"MASTER_ADDR": "localhost"})
    refuse_missing_address(started | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    refuse_missing_address({})


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_pack_has_one_process_and_all_make_as_many_passes(count: int) -> None:
    lengths = [3, 9, 14, 2, 7, 30, 1, 1, 5, 12]
    responses = Ragged.of([torch.ones(length, dtype=torch.int64) for length in lengths])
    packs = pack(Ragged.of([(1, 2)] * len(lengths)), responses, max_tokens=20)
    shares = [assign_packs(packs, rank=rank, count=count) for rank in range(count)]
    assert len({len(share) for share in shares}) == 1
    counted = [dealt.pack for share in shares for dealt in share if dealt.counts]
    assert sorted(map(id, counted)) == sorted(map(id, packs))
    loads = [sum(len(d.pack.input_ids) for d in share if d.counts) for share in shares]
    if count == 2:
        assert max(loads) - min(loads) <= 20, "one process has most of the work"


def test_nothing_to_deal() -> None:
    assert assign_packs([], rank=1, count=2) == []


REFUSED: dict[str, dict[str, Any]] = {
    "model.quantization": {"model": {"lora": {}, "quantization": "nf4"}},
    "rollout.engine vllm": {"rollout": {"engine": "vllm"}},
    "prior_resampling.trigger kl": {"prior_resampling": {"enabled": True, "trigger": "kl"}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_several_processes_cannot_do_is_refused_by_its_key(key: str) -> None:
    config = validate(REFUSED[key])
    refuse_world_size(config, 1)
    with pytest.raises(ConfigError, match=key):
        refuse_world_size(config, 2)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"tile_tokens": 4096}},
        {"model": {"lora": {}, "weights": "bfloat16"}},
        {"model": {"lora": {"dropout": 0.1}}},
        {"model": {"weights": "bfloat16"}},
        {"train": {"optimizer": "adamw_8bit"}},
        {"rollout": {"generate_ahead": True, "engine": "vllm_server"}},
        {"prior_resampling": {"enabled": True}},
        {"algorithm": {"kl": {"coef": 0.1, "estimator": "k2", "previous_share": 0.1}}},
        {"algorithm": {"kl": {"coef": 0.1, "rebase_at_step": 3}}},
    ],
)
def test_what_goes_with_several_processes(sections: dict[str, Any]) -> None:
    refuse_world_size(validate(sections), 2)


def test_the_command_says_so_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--prior_resampling.trigger", "tv", "--dry-run"]
    assert exit_code("train", "eapo", "--model.name", "m", "--data.train", "d", *words) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("exgrpo-fast: prior_resampling.trigger")
