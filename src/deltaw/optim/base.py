"""MatrixOptimizer: a torch optimizer made of chains, one per group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from deltaw.errors import CompositionError, OptionError, unknown_name
from deltaw.memory import keep_freed_memory
from deltaw.models import Site
from deltaw.optim import checks
from deltaw.optim.checkpoint import load
from deltaw.optim.context import Context
from deltaw.optim.driver import Driver
from deltaw.optim.gradients import usable
from deltaw.optim.groups import check_devices, check_group, distinct_entries
from deltaw.optim.sharding import check_placement, groups_of, local_gradient
from deltaw.optim.stack import Chunk, form_chunks, members_of, run_chain
from deltaw.optim.state import allocate, follow_device
from deltaw.optim.transform import Chain, Transform
from deltaw.optim.transforms import Adam
from deltaw.optim.views import default_view, matrix_site


class BaseOptions(TypedDict, total=False):
    """Keyword options that every optimizer of this room takes besides its own.

    adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: for the groups marked `chain="adamw"`.
    maximize: ascend.
    nonfinite: "raise" an error or "skip" the step when a gradient holds NaN or infinity; "ignore" saves the look at
        the gradients, one pass over them, and lets what is not finite into weights and state.
    seed: of every random draw.
    chunk_bytes: the most the weights of one stack may take; None is 1 MiB on the CPU, which stays in cache and
        clear of page faults, and 256 MiB on accelerators.
    statistics: what `deltaw.models.capture` returned, for transforms that need it.
    driver: see driver.py.
    divide: a process group (True: the default one) all of whose ranks hold the same parameters and gradients, as
        under DistributedDataParallel: each rank then works on its share of the matrices, and the updates are
        gathered (exchange.py). All ranks must pass it alike.
    """

    adamw_lr: float | Tensor
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float
    maximize: bool
    nonfinite: str
    seed: int
    chunk_bytes: int | None
    statistics: Mapping[Any, Tensor] | None
    driver: Driver | None
    divide: Any


@dataclass
class _Plan:
    """The stacks of a step. It holds its parameters, so the identities in `key` stay theirs while it lives."""

    key: Any = None
    chunks: dict[Chain, list[Chunk]] = field(default_factory=dict)


class MatrixOptimizer(torch.optim.Optimizer):
    """A chain of transforms on matrices and AdamW on the rest, in one optimizer.

    Args:
        params: parameters, named parameters, or group dicts. Besides `params` and any option by name, a group may
            hold `chain="adamw"` (elementwise AdamW, for embeddings, heads, norms, biases) and `views`, one
            (kind, layout, split) per parameter, where a parameter is not simply an [out, in] matrix (views.py).
        lr: learning rate of the matrix groups: a number or a tensor of one element.
        weight_decay: decoupled, multiplied with the unscaled learning rate.
        chain: transforms that turn a gradient into the update W loses lr times.
        around: maps the transforms of the AdamW groups to those in their place; see wrapper.py.
        Others: see `BaseOptions`.

    The options of the chain stand in `param_groups` and may be changed there between steps. All state is in
    `state[p]`, allocated at construction in its declared dtype, with `step` as a float32 scalar on the CPU.

    Raises:
        OptionError: an option outside its range; an empty group; a parameter that does not fit its group's chain;
            parameters on several kinds of device.
        NonFiniteError: in `step`, with nonfinite="raise"; nothing has changed by then.
        CompositionError: sparse gradients; parameters replaced after the first step; unsupported sharding.

    Examples:
        >>> import torch
        >>> from deltaw.optim import MatrixOptimizer, nesterov, orthogonalize, match_rms
        >>> w = torch.nn.Parameter(torch.randn(8, 4))
        >>> opt = MatrixOptimizer([w], lr=0.02, weight_decay=0.1,
        ...                       chain=[nesterov(0.95), orthogonalize(), match_rms(0.2)])
        >>> w.grad = torch.randn_like(w); opt.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        chain: Sequence[Transform],
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
        maximize: bool = False,
        nonfinite: str = "raise",
        seed: int = 0,
        chunk_bytes: int | None = None,
        statistics: Mapping[Any, Tensor] | None = None,
        driver: Driver | None = None,
        divide: Any = None,
        around: Callable[[tuple[Transform, ...]], Iterable[Transform]] = tuple,
    ) -> None:
        card = getattr(type(self), "card", None)
        self.main = card.id if card is not None else "matrix"
        self.chains = {
            "adamw": Chain(tuple(around((Adam(betas=adamw_betas, eps=adamw_eps),)))),
            self.main: Chain(tuple(chain)),
        }
        self.chain_defaults: dict[str, dict[str, Any]] = {
            "adamw": {"lr": adamw_lr, "weight_decay": adamw_weight_decay, **self.chains["adamw"].options()},
            self.main: {"lr": lr, "weight_decay": weight_decay, **self.chains[self.main].options()},
        }
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("raise", "skip", "ignore"))
        self.chunk_bytes = None if chunk_bytes is None else int(checks.number("chunk_bytes", chunk_bytes, 1))
        self.seed = int(checks.number("seed", seed))
        self.statistics = statistics
        self.driver = driver or Driver()
        self.divide = divide or None
        if self.divide is not None and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise OptionError(f"divide={divide!r} without a process group: call torch.distributed.init_process_group")
        self.constants: dict[Any, Any] = {}
        needs = {n for c in self.chains.values() for n in c.needs}
        missing = needs - {"weight", "grad"} - {k for k, _ in statistics or ()}
        if missing:
            raise CompositionError(
                f"the chain needs the statistics {sorted(missing)}: pass statistics=capture(model, …)"
            )
        self._owned: list[list[Tensor]] = []  # the parameters that state was made for, by group and position
        self._plan = _Plan()
        self._talk: list[Any] | None = None  # see `_groups`
        params = [params] if isinstance(params, Tensor) else list(params)
        super().__init__(params or [{"params": []}], {**self.chain_defaults[self.main], "maximize": bool(maximize)})

    # -- groups and state ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys. Its state is allocated at once."""
        group = dict(param_group)
        index = len(self.param_groups)
        group["params"] = distinct_entries(group, index)
        name = group.setdefault("chain", self.main)
        if name not in self.chains:
            raise unknown_name(f"chain of parameter group {index}", str(name), self.chains)
        numbers = {f"driver.{key}": value for key, value in self.driver.numbers().items()}
        for key, value in {**self.chain_defaults[name], **numbers}.items():
            group.setdefault(key, value)
        try:
            super().add_param_group(group)
        except ValueError as e:
            raise OptionError(f"parameter group {index}: {e}") from None
        added = self.param_groups[-1]
        for key in set(self.defaults) - set(self.chain_defaults[name]) - {"maximize"} - set(param_group):
            del added[key]  # torch fills every group with the defaults of the main chain
        try:
            self._chain(added)
            names = [self.name_of(index, position) for position in range(len(added["params"]))]
            check_group(added, index, {**self.chain_defaults[name], **numbers}, names)
            check_devices(self.param_groups)
            self._owned.append(list(added["params"]))
            for position, p in enumerate(added["params"]):
                self._allocate(p, added, index, position)
        except Exception:
            self.param_groups.pop()
            del self._owned[index:]
            raise

    def _chain(self, group: Mapping[str, Any]) -> Chain:
        chain = self.chains[group["chain"]]
        return chain.with_options({k: group[k] for k in chain.options()})

    def name_of(self, index: int, position: int) -> str:
        """The name of a parameter by group and position; made up from these when it was given without one."""
        names = self.param_groups[index].get("param_names")
        return names[position] if names else f"group{index}[{position}]"

    def _site(self, group: Mapping[str, Any], chain: Chain, index: int, position: int) -> Site | None:
        """How a parameter reads as matrices; None in an elementwise chain."""
        if not chain.needs_matrices:
            return None
        p, name = group["params"][position], self.name_of(index, position)
        view = group["views"][position] if "views" in group else default_view(p, name)
        return matrix_site(name, tuple(p.shape), view)

    def _allocate(self, p: Tensor, group: Mapping[str, Any], index: int, position: int) -> None:
        chain = self._chain(group)
        site = self._site(group, chain, index, position)
        name = self.name_of(index, position)
        if groups_of(p) and "fsdp2" in self.driver.refuses:
            raise CompositionError(
                f"parameter {name!r} is sharded, and {self.main!r} is not for that: {self.driver.refuses['fsdp2']}; give "
                "every rank the whole model"
            )
        check_placement(p, name, site, chain)
        self.state[p] = allocate(p, chain, site, self.driver.state_spec())
        self._talk = None

    def _dividing(self) -> Any:
        """The process group that shares the work on replicated parameters, or None."""
        group = torch.distributed.group.WORLD if self.divide is True else self.divide
        return group if group is not None and torch.distributed.get_world_size(group) > 1 else None

    def _groups(self) -> list[Any]:
        """The process groups whose ranks must decide alike about a step."""
        if self._talk is None:
            found = {id(g): g for p in self.parameters() for g in groups_of(p)}
            shared = self._dividing()
            if shared is not None:
                found[id(shared)] = shared
            self._talk = list(found.values())
        return self._talk

    def _sync(self) -> None:
        """Follow parameters that a framework has put in place of others, or that have moved to another device.

        Raises CompositionError when that happens after training began: the old state does not fit the new object.
        """
        for index, group in enumerate(self.param_groups):
            owned = self._owned[index]
            for position, p in enumerate(group["params"]):
                old = owned[position]
                if old is not p:
                    state = self.state.pop(old, None)
                    if state is not None and state["step"].item() > 0:
                        self.state[old] = state
                        raise CompositionError(
                            f"parameter {self.name_of(index, position)!r} was replaced in param_groups after it had taken "
                            f"{int(state['step'].item())} steps: wrap or shard the model before training, or load the "
                            "optimizer's state_dict into an optimizer built on the new parameters"
                        )
                    owned[position] = p
                    self._allocate(p, group, index, position)
                else:
                    follow_device(self.state[p], p.device)

    def parameters(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"]]

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; returns the closure's loss, or None.

        Zero gradients with lr 0 change nothing, neither weights nor state: distributed checkpointing calls
        that to make state appear.
        """
        return self.driver.step(closure, self)

    @torch.no_grad()
    def apply(self) -> bool:
        """Run the chains on the gradients as they stand; whether there was a step to take. Called by drivers; users
        call `step`."""
        self._sync()
        entries = [(i, j, p) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])]
        rates = [float(g["lr"]) for g in self.param_groups]
        taking = usable(
            [p for _, _, p in entries],
            [self.name_of(index, position) for index, position, _ in entries],
            self.nonfinite,
            still=not any(rates),
            groups=self._groups(),
            replicas=self.divide is not None,
        )
        if taking is None:
            return False
        active = [entry for entry, taken in zip(entries, taking, strict=True) if taken]
        if active and active[0][2].device.type == "cpu":
            keep_freed_memory()
        steps = [self.state[p]["step"] for _, _, p in active]
        torch._foreach_add_(steps, 1.0)
        iteration = max(int(s) for s in steps)
        for chain, chunks in self._chunks(active).items():
            run_chain(chain, chunks, (self._context(c, rates, iteration) for c in chunks), self.state)
        return True

    def _chunks(self, active: list[tuple[int, int, Tensor]]) -> dict[Chain, list[Chunk]]:
        """The stacks of this step, by chain; kept while parameters, options and missing gradients stay the same."""
        chains = [self._chain(group) for group in self.param_groups]
        flags = [bool(group["maximize"]) for group in self.param_groups]
        key = (tuple((id(p), index, p.shape) for index, _, p in active), tuple(chains), tuple(flags), self.chunk_bytes)
        if self._plan.key == key:
            return self._plan.chunks
        members = [
            (member, chains[index], flags[index])
            for index, position, p in active
            for member in members_of(
                p,
                index,
                self.name_of(index, position),
                self._site(self.param_groups[index], chains[index], index, position),
            )
            if member.rows or chains[index].scope == "model"  # a rank may hold none of a stack's experts
        ]
        plan: dict[Chain, list[Chunk]] = {}
        on_cpu = active[0][2].device.type == "cpu"
        limit = self.chunk_bytes or (1 << 20 if on_cpu else 1 << 28)
        singly = on_cpu and self.chunk_bytes is None
        for chunk in form_chunks(members, limit, self._dividing(), singly=singly):
            plan.setdefault(chunk.chain, []).append(chunk)
        self._plan = _Plan(key, plan)
        return plan

    def _context(self, chunk: Chunk, rates: list[float], iteration: int) -> Context:
        shards = chunk.shards
        grads = [m.view(local_gradient(m.param)) for m in chunk.members]
        weights = [m.view(m.param) for m in chunk.members]
        if any(g.dtype != w.dtype for g, w in zip(grads, weights, strict=True)):
            grads = [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
        if chunk.maximize:
            grads = list(torch._foreach_neg(grads))
        return Context(
            names=[m.name for m in chunk.members],
            grads=grads,
            weights=weights,
            steps=[float(self.state[m.param]["step"]) for m in chunk.members],
            lrs=[rates[m.group] for m in chunk.members],
            weight_decays=[float(self.param_groups[m.group]["weight_decay"]) for m in chunk.members],
            counts=[m.rows for m in chunk.members],
            shape=chunk.members[0].shape,
            seed=self.seed,
            iteration=iteration,
            constants=self.constants,
            statistics=self.statistics,
            mesh=shards.mesh if shards and shards.axis is not None else None,
            shards=shards,
            spread=[m.spread for m in chunk.members],
        )

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's format: plain numbers, strings and tensors, loadable with `weights_only=True`."""
        self._sync()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, each entry in its declared dtype (checkpoint.py).

        Raises CheckpointError, with nothing changed, when the checkpoint is of another model or optimizer.
        """
        self._sync()
        load(self, state_dict, super().load_state_dict)
        self._plan = _Plan()

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps groups and state only; a copy needs the chains too, but not torch's bound hooks
        public = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        return {**public, "_owned": self._owned, "_plan": _Plan(), "_talk": None}
