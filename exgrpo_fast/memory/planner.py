"""What a run holds, phase by phase, beside the size of the device; resolves `auto`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from exgrpo_fast.config import Config, ConfigError, with_values
from exgrpo_fast.memory.budgets import (
    RESERVE,
    EnginePlan,
    engine_plan,
    kv_bytes_per_token,
    max_model_len,
    store_plan,
)
from exgrpo_fast.memory.sharded import (
    Gathered,
    gathered,
    share,
    with_layers,
    with_released,
    with_scattered_head,
)
from exgrpo_fast.memory.tracing import Passes, Setting, Tracer
from exgrpo_fast.memory.trainer_memory import (
    Head,
    PackShape,
    States,
    Update,
    beside_a_teacher,
    frozen_copy,
    released,
    scoring,
    states,
    update,
)

GIB = 2**30
# Of `model.tile_tokens: auto`, where the run would not fit. Each tile adds its part to float32 sums
# of an MLP's gradients. Beside the products of 4096 tokens that is at most 5 % of the MLP's time on
# an H100 (8 bytes a weight at 3.35 TB/s; 8 x 4096 operations a weight at 692 TFLOP/s), of 1024
# tokens 20 %: for where nothing else helps.
TILE_TOKENS, SMALLEST_TILE_TOKENS = 4096, 1024
# Of a pack without checkpointing, where `auto` halves packs to do without: enough to keep products at
# their rate, so that the forward pass that is saved, a quarter of an update's operations, is a gain.
SMALLEST_KEPT_PACK = 4096
PHASES = ("rollout", "scoring", "update")
Bytes = dict[str, float]  # by phase


@dataclass(frozen=True)
class Machine:
    """`num_bytes`: of one GPU; None where it does not matter, as on a CPU. `engine`: of rollouts.

    `processes`: that share the weights; the plan is that of rank 0.
    """

    device: Literal["cpu", "cuda"]
    num_bytes: int | None
    engine: str
    processes: int = 1

    @property
    def usable(self) -> float | None:
        return None if self.num_bytes is None else (1 - RESERVE) * self.num_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """`rows`: what is held, by phase. `config`: with `auto` resolved."""

    config: Config
    machine: Machine
    rows: dict[str, Bytes]
    states: States
    update: Update
    engine: EnginePlan | None  # of vLLM on the same GPU
    engine_error: str | None  # why there can be none
    parameters: float
    trained: float
    bytes_per_token: float  # of KV

    @property
    def totals(self) -> Bytes:
        return {phase: sum(row.get(phase, 0.0) for row in self.rows.values()) for phase in PHASES}

    @property
    def peak(self) -> float:
        return max(self.totals.values())

    @property
    def states_and_passes(self) -> float:
        """The trainer's own peak, vLLM apart: what torch's allocator sees in a rehearsal."""
        own = (row for name, row in self.rows.items() if not name.startswith("vLLM"))
        phases = [(row.get("scoring", 0.0), row.get("update", 0.0)) for row in own]
        return max(map(sum, zip(*phases, strict=True)))

    @property
    def is_hopeless(self) -> bool:
        """No pack is small enough: weights, gradients and states alone are too much, or with what
        the one pack keeps that an update has to be."""
        usable, kept = self.machine.usable, self.states.resident + self.states.gradients
        if self.config.train.gradient_release:
            kept += self.update.saved
        return usable is not None and kept > usable

    @property
    def fits(self) -> bool:
        usable = self.machine.usable
        return self.engine_error is None and (usable is None or self.peak <= usable)


class Planner:
    """Plans for one model, given as its transformers config; passes are traced once."""

    def __init__(self, model: Any, machine: Machine) -> None:
        self.model, self.machine = model, machine
        self.tracers: dict[str, Tracer] = {}

    def tracer(self, config: Config) -> Tracer:
        """`config`: without `auto`, or what it is where no plan is made."""
        lora = config.model.lora
        setting = Setting(
            weights=self._weights(config),
            compute=self._compute(config),
            checkpointing=config.gradient_checkpointing,
            lora=lora.model_dump() if lora else None,
            tile_tokens=config.tile_tokens,
            gradient_release=config.train.gradient_release,
        )
        return self.tracers.setdefault(repr(setting), Tracer(self.model, setting))

    def _compute(self, config: Config) -> torch.dtype:
        return getattr(torch, config.model.compute_dtype(self.machine.device))

    def _weights(self, config: Config) -> torch.dtype:
        """As a pass sees them: sharded ones gathered in the compute dtype."""
        if self.machine.processes > 1:
            return self._compute(config)
        return getattr(torch, config.model.weights)

    def plan(self, config: Config) -> MemoryPlan:
        """The largest pack that fits, and no tiles or checkpoints where it does without, as `auto`
        allows."""
        first, *smaller = self._choices(config)
        made = self._plan(first)
        if made.fits:
            return self._without_checkpointing(config, made) or made
        if made.is_hopeless:
            smaller = [] if config.train.gradient_release else smaller[-1:]
        for choice in smaller:
            made = self._plan(choice)
            if made.fits:
                break
        return made

    def _without_checkpointing(self, config: Config, made: MemoryPlan) -> MemoryPlan | None:
        """The same with all activations kept: where `auto` allows it, vLLM gives up nothing for it,
        and packs stay large."""
        model = config.model
        may_keep = model.gradient_checkpointing == "auto" and not model.offload_activations
        if not may_keep or self.machine.usable is None or made.config.tile_tokens:
            return None
        # Each pack gathers all sharded weights: with several processes packs are not made smaller for it.
        smallest = made.config.microbatch_tokens
        if self.machine.processes == 1:
            smallest = min(SMALLEST_KEPT_PACK, smallest)
        for tokens in pack_sizes(config, self.machine.processes):
            if tokens < smallest:
                return None
            kept = self._plan(with_sizes(config, tokens, 0, checkpointing=False))
            if kept.fits and kept.engine == made.engine:
                return kept
        return None

    def _choices(self, config: Config) -> Iterator[Config]:
        """Without `auto` in the pack and the tiles, the fastest first."""
        is_auto = config.model.tile_tokens == "auto" and self.tracer(config).can_tile
        tokens = config.microbatch_tokens
        for tokens in pack_sizes(config, self.machine.processes):
            yield with_sizes(config, tokens, config.tile_tokens)
            if is_auto and tokens > TILE_TOKENS:
                yield with_sizes(config, tokens, TILE_TOKENS)
        if is_auto and tokens > SMALLEST_TILE_TOKENS:
            yield with_sizes(config, tokens, SMALLEST_TILE_TOKENS)

    def _plan(self, config: Config) -> MemoryPlan:
        """`config`: without `auto` in the pack and the tiles."""
        device, tracer, tokens = self.machine.device, self.tracer(config), config.microbatch_tokens
        weights = self._weights(config)
        chunk_rows = config.tile_tokens or None
        pack = PackShape(tokens, weights, self._compute(config), device, chunk_rows)
        passes = tracer(tokens)
        is_trained = config.model.lora is None
        head = Head(self.model.vocab_size, self.model.hidden_size, is_trained)
        held = states(
            passes,
            weights=getattr(torch, config.model.weights),
            optimiser=config.optimizer,
            references=num_references(config) * self._frozen_copy(config, passes),
            is_nf4=config.model.quantization is not None,
        )
        releases, whole = config.train.gradient_release, None
        gathered_bytes: Bytes = {}
        if releases:
            held = released(held, head, getattr(torch, config.model.weights))
        if self.machine.processes > 1:
            whole = self._gathered(passes, head, config)
            held, passes = share(held, self.machine.processes), with_layers(passes, whole)
            gathered_bytes = {"scoring": whole.for_scoring, "update": whole.for_update}
            head = head._replace(is_trained=False)  # its gradient is among what is gathered
        if whole is not None and releases:
            gathered_bytes["update"] -= whole.head_gradient
            passes = with_released(passes, whole)
        of_update = update(passes, head, pack)
        if whole is not None and releases:
            of_update = with_scattered_head(of_update, whole)
        if config.algorithm.distillation.is_over_vocabulary:
            of_update = beside_a_teacher(of_update, head, pack)
            if gathered_bytes:
                gathered_bytes["update"] += gathered_bytes["scoring"]
        if config.model.offload_activations:
            of_update = self._offloaded(of_update, tokens, weights)
        of_scoring = scoring(passes, head, pack)
        store = store_plan(config, num_questions=0).num_bytes if config.replay.enabled else 0
        kept = config.model.quantization or config.model.weights
        rows: dict[str, Bytes] = {
            f"weights ({kept}{' + adapter' if config.model.lora else ''})": everywhere(
                held.weights
            ),
            f"optimiser ({config.optimizer})": everywhere(held.optimiser),
            "reference policies": everywhere(held.references),
            "experience store": everywhere(store),
            "gradient of the head" if releases else "gradients": {"update": held.gradients},
            "gathered head and embedding": gathered_bytes,
            "activations kept": {"update": of_update.saved},
            "working memory, logits": {"update": of_update.peak - of_update.saved},
            "forward pass, logits": {"scoring": of_scoring},
        }
        if config.rollout.top_k > 0:  # int32 ids, in the worst case as many for every token
            sets = 4 * tokens * config.rollout.top_k
            rows["tokens that top_k kept"] = {"scoring": sets, "update": sets}
        made = MemoryPlan(
            config=config,
            machine=self.machine,
            rows=rows,
            states=held,
            update=of_update,
            engine=None,
            engine_error=None,
            parameters=passes.frozen + passes.trained,
            trained=passes.trained,
            bytes_per_token=kv_bytes_per_token(
                self.model, dtype=config.model.compute_dtype(device)
            ),
        )
        return self._with_engine(made, passes)

    def _gathered(self, passes: Passes, head: Head, config: Config) -> Gathered:
        """What one rank holds beside its shards."""
        return gathered(
            passes,
            head,
            layers=self.model.num_hidden_layers,
            is_tied=getattr(self.model, "tie_word_embeddings", False),
            compute=self._compute(config),
            count=self.machine.processes,
            weights=getattr(torch, config.model.weights),
            device=self.machine.device,
        )

    def _offloaded(self, made: Update, tokens: int, weights: torch.dtype) -> Update:
        """Without the checkpoints of the layers, which have the embedding's dtype."""
        gone = self.model.num_hidden_layers * tokens * self.model.hidden_size * weights.itemsize
        names = ("saved", "forward", "loss", "backward")
        return replace(made, **{name: getattr(made, name) - gone for name in names})

    def _frozen_copy(self, config: Config, passes: Passes) -> float:
        """Bytes of one reference; shards keep the dtype of the weights, to be gathered in another."""
        weights = getattr(torch, config.model.weights)
        compute = self._compute(config) if self.machine.processes == 1 else weights
        return frozen_copy(passes, weights, compute)

    def _with_engine(self, made: MemoryPlan, passes: Passes) -> MemoryPlan:
        """The rollout engine beside the trainer; vLLM takes what is left, up to what it needs."""
        config, machine = made.config, self.machine
        dtype = config.model.compute_dtype(machine.device)
        parameters = passes.frozen or passes.trained
        if machine.engine == "transformers":
            rows = made.rows | {"generation": {"rollout": self._generation_bytes(made)}}
            if machine.device == "cpu":  # rollout/hf/packed_weights.py
                copied = getattr(torch, dtype).itemsize * parameters
                rows["generation: packed weights"] = {"rollout": copied}
            if machine.processes > 1:
                copied = frozen_copy(passes, torch.float32, self._compute(config))
                rows["whole copy for generation"] = everywhere(copied)
            return replace(made, rows=rows)
        if machine.engine != "vllm" or machine.num_bytes is None:
            return made
        try:
            engine = engine_plan(
                config,
                self.model,
                num_parameters=int(parameters),
                dtype=dtype,
                device=machine.device,
                device_bytes=machine.num_bytes,
                trainer_bytes=int(made.peak),
                resident_bytes=int(made.totals["scoring"]),
            )
        except ConfigError as error:
            return replace(made, engine_error=str(error))
        awake = PHASES[: 2 if engine.sleeps else 3]
        size = 2 if dtype == "bfloat16" else 4
        rows = made.rows | {
            "vLLM: weights": dict.fromkeys(awake, size * parameters),
            "vLLM: keys and values": dict.fromkeys(awake, float(engine.kv_cache_bytes)),
        }
        return replace(made, engine=engine, rows=rows)

    def _generation_bytes(self, made: MemoryPlan) -> float:
        """transformers' own cache and logits of all sequences side by side: an estimate."""
        rollout = made.config.rollout
        sequences = min(rollout.max_batch_sequences, rollout.prompts_per_step * rollout.group_size)
        length = max_model_len(made.config, self.model.max_position_embeddings)
        logits = 16 * self.model.vocab_size  # four float32 copies on the way to a token
        return sequences * (length * made.bytes_per_token + logits)


def everywhere(num_bytes: float) -> Bytes:
    return dict.fromkeys(PHASES, num_bytes)


def num_references(config: Config) -> int:
    """Whole frozen copies; with adapters the base is the model without them.

    A teacher counts as one, whatever its size.
    """
    kl, count = config.algorithm.kl, int(config.algorithm.distillation.teacher is not None)
    if kl.coef == 0.0 or kl.reference == "behaviour":
        return count
    is_free = config.model.lora is not None and kl.rebase_at_step is None
    return count + (0 if is_free else 1) + (1 if kl.previous_share else 0)


def pack_sizes(config: Config, ranks: int) -> Iterator[int]:
    """Tokens of a pack: halved as long as one sequence of full length goes in, if left to `auto`,
    and an update need not be one pack a rank."""
    tokens = config.preferred_tokens(ranks)
    yield tokens
    train = config.train
    if train.max_tokens_per_microbatch == "auto" and not train.gradient_release:
        while tokens > config.longest_sequence:
            tokens = max(tokens // 2, config.longest_sequence)
            yield tokens


def with_sizes(
    config: Config, pack_tokens: int, tile_tokens: int, *, checkpointing: bool | None = None
) -> Config:
    """`config` with nothing left to `auto` that a plan decides; `checkpointing`: None = as where no
    plan is made."""
    if checkpointing is None:
        checkpointing = config.gradient_checkpointing
    values = {
        "train.max_tokens_per_microbatch": pack_tokens,
        "model.tile_tokens": tile_tokens,
        "model.gradient_checkpointing": checkpointing,
    }
    return with_values(config, values)


# --- as text --------------------------------------------------------------------------------------


def table(made: MemoryPlan, asked: Config) -> str:
    """A row for each thing that is held, a column for each phase, GiB; what `asked` left to auto."""
    held = {name: row for name, row in made.rows.items() if any(row.values())}
    width = max(map(len, held))
    lines = [_title(made), "", f"{'GiB':<{width}}" + "".join(f"{p:>10}" for p in PHASES)]
    for name, row in held.items():
        lines.append(f"{name:<{width}}" + "".join(_cell(row.get(p)) for p in PHASES))
    lines.append(f"{'total':<{width}}" + "".join(_cell(made.totals[p]) for p in PHASES))
    if made.machine.usable is not None:
        free = {p: made.machine.usable - made.totals[p] for p in PHASES}
        lines.append(f"{'left':<{width}}" + "".join(_cell(free[p]) for p in PHASES))
    return "\n".join([*lines, "", *_resolved(made, asked)])


def _title(made: MemoryPlan) -> str:
    device = "a CPU"
    if made.machine.num_bytes is not None and made.machine.usable is not None:
        device = (
            f"{made.machine.num_bytes / GIB:.4g} GiB, of which {made.machine.usable / GIB:.4g} "
            f"are planned with (the rest: contexts, fragments, libraries)"
        )
    if made.machine.processes > 1:
        device += f", rank 0 of {made.machine.processes}"
    return (
        f"memory plan: {made.parameters / 1e9:.3f} billion parameters, "
        f"{made.trained / 1e9:.3f} trained, on {device}"
    )


def _cell(num_bytes: float | None) -> str:
    return f"{'-':>10}" if not num_bytes else f"{num_bytes / GIB:>10.2f}"


def _resolved(made: MemoryPlan, asked: Config) -> list[str]:
    config, tokens = made.config, made.config.microbatch_tokens
    how = _how(asked.train.max_tokens_per_microbatch)
    state = (made.states.resident + made.states.gradients) / max(made.trained, 1)
    lines = [f"train.max_tokens_per_microbatch {tokens}{how}"]
    if config.model.lora is None:
        lines[0] += f"; {state:.2f} bytes a parameter for weights, gradients and states"
    lines.append(
        f"activations {made.update.saved / tokens / 2**20:.3f} MiB a token, logits in chunks of "
        f"{made.update.chunk / 2**20:.0f} MiB"
    )
    if config.train.gradient_release:
        each = "an update" if made.machine.processes == 1 else "an update on each process"
        lines.append(f"train.gradient_release: one pack {each}, gradients freed as they are made")
    checkpointing = config.gradient_checkpointing
    kept = "the inputs of layers" if checkpointing else "all of a layer's activations"
    lines.append(
        f"model.gradient_checkpointing {str(checkpointing).lower()}"
        f"{_how(asked.model.gradient_checkpointing)}: {kept} are kept"
    )
    tiles = "MLPs, norms and logits in tiles" if config.tile_tokens else "no tiles"
    lines.append(f"model.tile_tokens {config.tile_tokens}{_how(asked.model.tile_tokens)}: {tiles}")
    if made.engine is not None:
        kv = made.engine.kv_cache_bytes
        given = "" if config.rollout.kv_cache_gib else " (auto)"
        lines.append(
            f"rollout.kv_cache_gib {kv / GIB:.2f}{given}: {kv / made.bytes_per_token:,.0f} tokens"
        )
        lines.append(
            f"rollout.sleep {config.rollout.sleep}: vLLM "
            + ("sleeps during the update" if made.engine.sleeps else "stays awake")
        )
    return lines


def _how(asked: int | str | bool) -> str:
    return " (auto)" if asked == "auto" else ""
