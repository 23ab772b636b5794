"""The rollout servers of a config: started as processes of this machine, or found at their URLs."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import EngineLost
from exgrpo_fast.rollout.server.engine import ServerEngine
from exgrpo_fast.rollout.server.fleet import Server
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
        self.config, self.arguments, self.log_folder = config, arguments, log_folder
        self.settings, self.stack = config.rollout.server, stack
        self.dtype = getattr(torch, arguments["dtype"])
        self.lock = threading.Lock()  # of the list of processes
        self.processes: list[ServerProcess] | None = []  # None: closed
        stack.callback(self.close)
        for number in range(0 if self.settings.urls else self.settings.count):
            self.processes.append(self._start(number))

    def _start(self, number: int) -> ServerProcess:
        on_gpu = self.arguments["device"] == "cuda"
        gpu = server_gpu(self.config, number) if on_gpu else None
        log = self.log_folder / f"rollout-{number}.log" if self.log_folder else None
        return ServerProcess(self.arguments, name=str(number), gpu=gpu, log=log)

    def _restart(self, number: int) -> ServerConnection:
        """Another process in place of this one, once it is ready; EngineLost where that fails."""
        with self.lock:
            if self.processes is None:
                raise EngineLost(f"rollout engine {number} is closed")
            old = self.processes[number]
        old.close()
        with self.lock:
            if self.processes is None:
                raise EngineLost(f"rollout engine {number} is closed")
            new = self.processes[number] = self._start(number)
        new.wait_until_ready(deadline=START_SECONDS)
        return new.connection

    def engine(self, policy: Policy) -> ServerEngine:
        """Waits until the servers have loaded."""
        assert self.processes is not None
        for process in self.processes:
            process.wait_until_ready(deadline=START_SECONDS)
        settings, key = self.settings, os.environ.get(self.settings.key_env, "")
        servers = [
            Server(process.connection, partial(self._restart, number))
            for number, process in enumerate(self.processes)
        ] or [Server(ServerConnection(name=url, key=key, url=url)) for url in settings.urls or []]
        if settings.weights == "shared_memory":
            sender = SharedMemorySender(self.dtype)
        else:
            sender = BroadcastSender(
                self.dtype,
                device=policy.device,
                host=settings.host,
                timeout_seconds=settings.deadline_seconds,
            )
        self.stack.callback(sender.close)
        at_a_time = settings.max_in_flight or self.config.rollout.max_batch_sequences * 5 // 4
        return ServerEngine(
            servers,
            policy,
            sender,
            deadline=settings.deadline_seconds,
            patience=settings.patience_seconds,
            max_in_flight=max(1, at_a_time),
            close_servers=self.close,
        )

    def close(self) -> None:
        with self.lock:
            processes, self.processes = self.processes or [], None
        for process in processes:
            process.close()


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
