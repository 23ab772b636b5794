"""The rollout servers of a config: started as processes of this machine, or found at their URLs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.server.engine import ServerEngine
from exgrpo_fast.rollout.server.process import ServerConnection, ServerProcess
from exgrpo_fast.rollout.server.weight_transfer import BroadcastSender, SharedMemorySender

START_SECONDS = 600.0  # a large model is read from a slow disk


class RolloutServers:
    """They load in the background; `stack` closes what is started here."""

    def __init__(
        self,
        config: Config,
        arguments: dict[str, Any],
        stack: ExitStack,
        *,
        log_folder: Path | None = None,
    ) -> None:
        """`arguments`: of a `VllmModel`. ConfigError where there is no GPU for a server."""
        self.settings, self.stack = config.rollout.server, stack
        self.dtype = getattr(torch, arguments["dtype"])
        self.processes: list[ServerProcess] = []
        for number in range(0 if self.settings.urls else self.settings.count):
            gpu = server_gpu(config, number) if arguments["device"] == "cuda" else None
            log = log_folder / f"rollout-{number}.log" if log_folder else None
            process = ServerProcess(arguments, name=str(number), gpu=gpu, log=log)
            stack.callback(process.close)
            self.processes.append(process)

    def engine(self, policy: Policy) -> ServerEngine:
        """Waits until the servers have loaded."""
        for process in self.processes:
            process.wait_until_ready(deadline=START_SECONDS)
        settings, key = self.settings, os.environ.get(self.settings.key_env, "")
        connections = [process.connection for process in self.processes] or [
            ServerConnection(name=url, key=key, url=url) for url in settings.urls or []
        ]
        if settings.weights == "shared_memory":
            sender = SharedMemorySender(self.dtype)
        else:
            sender = BroadcastSender(
                self.dtype,
                device=policy.device,
                num_servers=len(connections),
                host=settings.host,
            )
        self.stack.callback(sender.close)
        return ServerEngine(
            connections,
            policy,
            sender,
            processes=self.processes,
            deadline=settings.deadline_seconds,
        )


def server_gpu(config: Config, number: int) -> int:
    """ConfigError where there is no GPU for a server."""
    gpus, found = config.rollout.server.gpus, torch.cuda.device_count()
    gpu = number + 1 if gpus is None else (gpus[number] if number < len(gpus) else found)
    if gpu >= found:
        raise ConfigError(
            f"rollout.server.gpus: no GPU for server {number}; this machine has {found}, and the "
            f"trainer uses the first (rollout.engine vllm shares one GPU)"
        )
    return gpu
