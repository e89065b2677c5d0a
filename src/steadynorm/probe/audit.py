"""One training step, watched: which phase moves which running statistics, and how often what is called.

Calls are seen by hooks on all modules, so that a teacher inside a loss is seen too. Whether a call makes activations
anew is asked of autograd, as torch's own checkpointing does: a call inside the backward pass has a graph task.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from steadynorm import models
from steadynorm.blame import in_a_line
from steadynorm.errors import SteadynormError
from steadynorm.probe.copies import stale
from steadynorm.probe.effects import Loss
from steadynorm.probe.optimizer import remember_optimizer
from steadynorm.probe.samples import tensors_in
from steadynorm.probe.trace import Forward, ForwardRaised, NotPossible, seed
from steadynorm.probe.training_facts import Audit, NormStep, Phase, StaleCopy
from steadynorm.weights import STATISTICS

Step = Callable[[nn.Module, Any], Any]
"""A training step of the user's own: (model, batch), with forward, backward and optimizer in it."""


def audit(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    step: Step | None = None,
) -> Audit:
    """One training step on `batch`, in the mode in which the model is; the caller puts the model back.

    Optimizers, and other networks that are called, are put back here. Without a loss it is the mean square of the
    outputs: which statistics move does not depend on it.

    Raises:
        ForwardRaised: the model's forward raised.
        NotPossible: the loss, the backward pass or the optimizer raised.
    """
    before = {path: layer.training for path, layer in models.norms(model).items()}
    witness = _Witness(model)
    with witness.watching():
        seed()
        with torch.enable_grad():
            if step is None:
                _own_step(model, batch, forward, loss, optimizer)
            else:
                _users_step(model, batch, step)
        found = witness.found(is_users=step is not None)
    after = {path: layer.training for path, layer in models.norms(model).items()}
    left = tuple(path for path, was in before.items() if was and not after.get(path, was))
    return Audit(**{**vars(found), "left_evaluating": left})


def _own_step(model: nn.Module, batch: Any, forward: Forward, loss: Loss | None, optimizer: Optimizer | None) -> None:
    model.zero_grad(set_to_none=True)
    try:
        output = forward(model, batch)
    except Exception as error:
        is_sentence = isinstance(error, SteadynormError) and isinstance(error.__cause__, Exception)
        raise ForwardRaised from error.__cause__ if is_sentence else error
    what = "the loss"
    try:
        value = _surrogate(output) if loss is None else loss(output, batch)
        if isinstance(value, Tensor) and value.requires_grad:
            what = "the backward pass"
            value.backward()
        what = "the optimizer's step"
        if optimizer is not None:
            optimizer.step()
    except Exception as error:
        raise NotPossible(f"{what} raised {in_a_line(error)}") from error


def _users_step(model: nn.Module, batch: Any, step: Step) -> None:
    try:
        step(model, batch)
    except Exception as error:
        raise NotPossible(f"the given training step raised {in_a_line(error)}") from error


def _surrogate(output: Any) -> Tensor | None:
    parts = [t.float().square().mean() for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    return torch.stack(parts).sum() if parts else None


class _Witness:
    """Sees all calls of all modules, and all steps of all optimizers, on behalf of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.own = {module: path for module, path in self.paths.items() if models.norm_kind(module)}
        self.foreign: dict[nn.Module, str] = {}
        self.running: list[nn.Module] = []
        self.stepping = 0
        self.forwards = self.optimizer_steps = 0
        self.arrivals: Counter[int] = Counter()
        self.calls: dict[nn.Module, Counter[Phase]] = {}
        self.updates: dict[nn.Module, Counter[Phase]] = {}
        self.before: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
        self.trained: set[nn.Module] = set()
        self.with_gradients: set[nn.Module] = set()
        self.roots: dict[nn.Module, None] = {}
        self.held: set[int] = set()
        self.restores: dict[int, Callable[[], None]] = {}
        # Of parts that take no gradient, of the others as they might copy; before the step parts them.
        self.stale_copies: dict[str, StaleCopy] = {}
        for part, path in self.paths.items():
            if _is_frozen(part) and part is not model and next(part.children(), None) is not None:
                self._note_copy(part, path)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    handle = parameter.register_post_accumulate_grad_hook(self._arrived)
                    stack.callback(handle.remove)
            for handle in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
                register_optimizer_step_pre_hook(self._step_begins),
                register_optimizer_step_post_hook(self._step_ends),
            ):
                stack.callback(handle.remove)
            try:
                yield
            finally:
                for restore in self.restores.values():
                    restore()

    def _arrived(self, parameter: Tensor) -> None:
        self.arrivals[id(parameter)] += 1

    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restores.setdefault(id(optimizer), remember_optimizer(optimizer))
        self.optimizer_steps += 1
        self.stepping += 1
        self.held |= {id(p) for group in optimizer.param_groups for p in group["params"]}

    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.stepping -= 1

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if module not in self.paths and module not in self.foreign and not self.running:
            self._meet(module)
        if module is self.model and module.training and self._phase() != "backward" and not self.stepping:
            self.forwards += 1
        if module in self.own or module in self.foreign:
            self.before.setdefault(module, []).append(_statistics(module))
        self.running.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        while self.running and self.running.pop() is not module:
            pass
        if not (module in self.own or module in self.foreign) or not self.before.get(module):
            return
        phase = self._phase()
        self.calls.setdefault(module, Counter())[phase] += 1
        has_moved = not all(map(_is_same, self.before[module].pop(), _statistics(module)))
        self.updates.setdefault(module, Counter())[phase] += int(has_moved)
        if module.training:
            self.trained.add(module)
        if torch.is_grad_enabled():
            self.with_gradients.add(module)

    def _phase(self) -> Phase:
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        if self.stepping:
            return "optimizer"
        return "forward" if self.model in self.running else "outside"

    def _meet(self, root: nn.Module) -> None:
        """Another network, or one around this one: it is put back like the model, and its norms are watched."""
        if isinstance(root, torch.jit.ScriptModule) or self.model in set(root.modules()):
            return
        if all(layer in self.paths for layer in models.norms(root).values()):
            return
        self.roots[root] = None
        self.restores.setdefault(id(root), models.remember(root))
        for path, layer in models.norms(root).items():
            if layer not in self.paths:
                self.foreign.setdefault(layer, f"{type(root).__name__}.{path}" if path else type(root).__name__)
        if next(root.children(), None) is not None:
            self._note_copy(root, type(root).__name__)

    def _note_copy(self, network: nn.Module, name: str) -> None:
        """Hold another network, or a part of this one, against those that it may be a copy of."""
        originals = [m for m in self.paths if next(m.children(), None) is not None and not _is_frozen(m)]
        inside = {f"{name}.{path}": child for path, child in network.named_children()}
        for place, candidate in {name: network, **inside}.items():  # a wrapper holds the copy
            for path, one in stale(candidate, originals).items():
                self.stale_copies.setdefault(f"{place}.{path}", one)

    def found(self, is_users: bool) -> Audit:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return Audit(
            forwards=self.forwards,
            backwards=max(self.arrivals.values(), default=0),
            optimizer_steps=self.optimizer_steps,
            norms={path: self._norm(module, path) for module, path in self.own.items() if module in self.calls},
            helpers={path: self._norm(module, path) for module, path in self.foreign.items() if module in self.calls},
            copies=self._copies(),
            stale_copies=self.stale_copies,
            is_users=is_users,
            optimized=frozenset(names[i] for i in self.held if i in names),
        )

    def _norm(self, module: nn.Module, path: str) -> NormStep:
        return NormStep(
            path,
            type(module).__name__,
            calls=dict(self.calls[module]),
            updates={phase: n for phase, n in self.updates[module].items() if n},
            trained=module in self.trained,
            without_gradients=module not in self.with_gradients or not self._is_trained(module),
        )

    def _is_trained(self, module: nn.Module) -> bool:
        """Whether anything in the network that a layer is part of takes a gradient."""
        network = next((root for root in self.roots if module in set(root.modules())), self.model)
        return any(parameter.requires_grad for parameter in network.parameters())

    def _copies(self) -> frozenset[str]:
        """Norms of networks that have a twin with parameters of the same shapes, as a moving average has.

        Of the model's own parts only those count that take no gradient: blocks of one kind are no copies of each other.
        """
        frozen = [m for m in self.paths if _is_frozen(m) and m is not self.model]
        others = [m for m in self.paths if m not in frozen]
        known = {_shapes(m) for m in others if next(m.children(), None) is not None}
        found: set[nn.Module] = set()
        for root in (*self.roots, *frozen):
            if next(root.children(), None) is not None and len(_shapes(root)) > 1 and _shapes(root) in known:
                found |= set(root.modules())
        return frozenset(path for module, path in {**self.own, **self.foreign}.items() if module in found)


def _is_frozen(module: nn.Module) -> bool:
    gradients = [parameter.requires_grad for parameter in module.parameters()]
    return bool(gradients) and not any(gradients)


def _shapes(module: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in module.parameters())


def _statistics(module: nn.Module) -> tuple[Tensor, ...]:
    found: Sequence[Any] = [module._buffers.get(name) for name in STATISTICS]
    return tuple(t.detach().clone() for t in found if isinstance(t, Tensor))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
