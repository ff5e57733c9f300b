"""What may befall a network, one function each: an event joins as a function that is named in ``EVENTS``.

An event is called in each world with a random source of the same seed, changes the world as a user would, and returns
what the user sees: tensors in any nest. How plain torch and the engine differ is the world's matter, not an event's.
"""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from fuzz.makers import HOOKS, Times
from fuzz.worlds import World
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from dstlib.inputs import tensors_in

# --------------------------------------------------------------------------------------------------------- passes


def _loss(y: Any, r: Random, world: World) -> Tensor:
    parts = [x for x in tensors_in(y) if x.is_floating_point()]
    return sum((x * world.draw(r, x.shape)).mean() + x.square().mean() for x in parts)  # type: ignore[return-value]


@contextmanager
def _recording(r: Random) -> Iterator[None]:
    with r.choice((torch.no_grad, torch.no_grad, torch.inference_mode, torch.enable_grad))():
        yield


def _look(world: World, r: Random) -> Any:
    """Evaluates in one grad mode or another; what comes out is held for the rest of the life."""
    with _recording(r):
        y = world.keep(world.model(world.input(r)))
        return [x.clone() for x in tensors_in(y)]


def evaluate(world: World, r: Random) -> Any:
    if r.random() < 0.5:
        world.model.eval()
    return [_look(world, r) for _ in range(r.randint(1, 3))]


def train(world: World, r: Random) -> Any:
    """Steps of SGD; under a sparsifier its masks move."""
    if r.random() < 0.7:
        world.model.train()
    optimizer = torch.optim.SGD(world.model.parameters(), lr=0.05, momentum=r.choice((0.0, 0.9)))
    losses = []
    for _ in range(r.choice((1, 1, 2, 5))):
        optimizer.zero_grad(set_to_none=r.random() < 0.5)
        loss = _loss(world.model(world.input(r)), r, world)
        loss.backward()
        if r.random() < 0.3:
            losses.append(_look(world, r))
        optimizer.step()
        losses.append(loss.detach())
    return losses


def accumulate(world: World, r: Random) -> Any:
    """Adds gradients up, of passes that overlap."""
    world.model.zero_grad()
    losses = [_loss(world.model(world.input(r)), r, world) for _ in range(2)]
    for loss in losses[:: r.choice((1, -1))]:
        loss.backward()
    return [x.detach() for x in losses]


def backward_twice(world: World, r: Random) -> Any:
    world.model.zero_grad()
    loss = _loss(world.model(world.input(r)), r, world)
    loss.backward(retain_graph=r.random() < 0.8)
    loss.backward()
    return loss.detach()


def input_gradient(world: World, r: Random) -> Any:
    x = _strided(world.input(r).requires_grad_(r.random() < 0.8), r)
    if r.random() < 0.3:
        for parameter in world.model.parameters():
            parameter.requires_grad_(False)
    try:
        return torch.autograd.grad(_loss(world.model(x), r, world), x)
    finally:
        for parameter in world.model.parameters():
            parameter.requires_grad_(True)


def second_gradient(world: World, r: Random) -> Any:
    """A penalty on the gradient of the input."""
    x = world.input(r).requires_grad_()
    y = sum(y.square().sum() for y in tensors_in(world.model(x)))
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(grad.square().sum() + 0 * x.sum(), x)  # it may not depend on x, or not be known to


def forward_gradient(world: World, r: Random) -> Any:
    """The derivative along a direction, which goes forward with the values."""
    x = world.input(r)
    with r.choice((torch.no_grad, torch.enable_grad))(), forward_ad.dual_level():
        y = world.model(forward_ad.make_dual(x, world.draw(r, x.shape)))
        return list(forward_ad.unpack_dual(y))


def mapped(world: World, r: Random) -> Any:
    """vmap over inputs, or over sets of parameters."""
    if world.is_doubled:
        return None
    world.model.eval()
    x = world.draw(r, (2, *r.choice(world.shapes)))
    if r.random() < 0.5:
        return torch.func.vmap(world.model)(x)
    several = {name: torch.stack([p.detach(), p.detach() * 0.5]) for name, p in world.model.named_parameters()}
    return torch.func.vmap(lambda p, x: torch.func.functional_call(world.model, p, (x,)))(several, x)


def functional_gradient(world: World, r: Random) -> Any:
    if world.is_doubled:
        return None
    parameters = {name: p.detach() for name, p in world.model.named_parameters()}
    x = world.input(r)
    return torch.func.grad(lambda p: torch.func.functional_call(world.model, p, (x,)).square().mean())(parameters)


def functional(world: World, r: Random) -> Any:
    """A call with other parameters, some or all."""
    if world.is_doubled:
        return None
    others = {
        name: p.detach() * r.choice((-1.0, 0.5)) for name, p in world.model.named_parameters() if r.random() < 0.7
    }
    x = world.input(r)
    before = _look(world, r)
    with _recording(r):
        y = torch.func.functional_call(world.model, others, (x,))
    return [before, y, _look(world, r)]


def checkpointed(world: World, r: Random) -> Any:
    world.model.zero_grad()
    x = world.input(r).requires_grad_()
    y = checkpoint(world.model, x, use_reentrant=r.random() < 0.5)
    _loss(y, r, world).backward()
    return x.grad


def threads(world: World, r: Random) -> Any:
    """Several passes at the same time."""
    world.model.eval()
    inputs = [world.input(r) for _ in range(3)]
    modes = [r.choice((torch.no_grad, torch.inference_mode, torch.enable_grad)) for _ in inputs]
    found: list[Any] = [None] * len(inputs)

    def run(index: int) -> None:
        try:
            with modes[index]():
                for _ in range(3):
                    found[index] = world.model(inputs[index])
        except Exception as error:
            found[index] = error

    workers = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each in found:
        if isinstance(each, Exception):
            raise each
    return [x.detach().clone() for x in tensors_in(found)]


def layer_alone(world: World, r: Random) -> Any:
    """Calls a layer by itself."""
    if not world.layers:
        return None
    name = r.choice(sorted(world.layers))
    if r.random() < 0.3:
        _scale(world, r)
    with _recording(r):
        return world.model.get_submodule(name)(world.draw(r, world.layers[name]))


def half_precision(world: World, r: Random) -> Any:
    """A pass under autocast; what comes out is as exact as its type."""
    with _recording(r), torch.autocast("cpu", torch.bfloat16):
        return [x.to(world.dtype) for x in tensors_in(world.model(world.input(r)))]


# --------------------------------------------------------------------------------------------------------- inputs


def _strided(x: Tensor, r: Random) -> Tensor:
    """The same values otherwise in memory."""
    match r.randrange(8):
        case 0 if x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        case 1 if x.ndim == 5:
            return x.contiguous(memory_format=torch.channels_last_3d)
        case 2:
            return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
        case 3:
            return torch.stack([x, -x], dim=-1)[..., 0]
        case 4:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case 5:
            return torch.complex(-x, -x).conj().imag  # negated lazily
        case 6 if x.ndim > 2:
            return x.movedim(2, -1).contiguous().movedim(-1, 2)
        case 7:
            return x[:1].expand_as(x)
    return x


def strides(world: World, r: Random) -> Any:
    x = _strided(world.input(r), r)
    with _recording(r):
        return [world.model(x), _look(world, r)]


def other_inputs(world: World, r: Random) -> Any:
    """Sizes and kinds that torch takes, or refuses."""
    x = world.input(r)
    match r.randrange(9):
        case 0:
            x = x[0]
        case 1:
            x = x[:0]
        case 2:
            x = nn.Parameter(x)
        case 3:
            x = world.draw(r, (r.randint(1, 4), x.shape[1], *(r.randint(1, 12) for _ in x.shape[2:])))
        case 4:
            x = x[..., :0]
        case 5:
            x = world.draw(r, (40, *x.shape[1:]))
        case 6:
            x = x.as_subclass(Plain)
        case 7:
            with torch.inference_mode():
                x = x + 0
        case 8:
            x = x * 1e4
    with _recording(r):
        y = world.model(x)
    return [x.as_subclass(Tensor) for x in tensors_in(y)]


class Plain(Tensor):
    """A tensor of a class of its own."""


def wrong_inputs(world: World, r: Random) -> Any:
    """Channels, axes and types that do not fit, or do."""
    x = world.input(r)
    channels = x.shape[1]
    match r.randrange(9):
        case 0:
            x = x[:, : channels - 1]
        case 1:
            x = torch.cat([x, x], dim=1)
        case 2:
            x = x[None]
        case 3:
            x = x.transpose(0, 1)
        case 4:
            x = x.flatten(1)
        case 5:
            x = x.to(torch.float64 if world.dtype == torch.float32 else torch.float32)
        case 6:
            x = x.long()
        case 7:
            x = x.to(torch.complex64)
        case 8:
            x = x.movedim(1, -1)
    with _recording(r):
        return world.model(x)


def wrong_layer_inputs(world: World, r: Random) -> Any:
    """What a layer by itself is called with, and does not take, or does."""
    if not world.layers:
        return None
    name = r.choice(sorted(world.layers))
    shape = list(world.layers[name])
    axis = r.randrange(len(shape))
    shape[axis] = max(0, shape[axis] + r.choice((-1, 1, 3)))
    if r.random() < 0.2:
        del shape[r.randrange(len(shape))]
    with _recording(r):
        return world.model.get_submodule(name)(world.draw(r, shape))


# -------------------------------------------------------------------------------------------------------- outputs


def _pickled(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _written(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def apply(y: Tensor) -> Tensor:
        change(y)
        return y

    return apply


WAYS: tuple[Callable[[Tensor], Any], ...] = (
    _written(lambda y: y.add_(1)),
    _written(torch.relu_),
    _written(lambda y: y.__setitem__((slice(None), 0), 0.0)),
    _written(lambda y: torch.add(y, 1, out=y)),
    _written(lambda y: y.clamp_(min=0)),
    _written(lambda y: y.copy_(torch.zeros_like(y))),
    _written(lambda y: y.view_as(y).zero_()),
    _written(lambda y: y.detach().mul_(2)),
    _written(lambda y: y.data.mul_(2)),
    _written(lambda y: y[..., :1].fill_(3)),
    _written(lambda y: y.flatten()[:1].fill_(3)),
    _written(lambda y: y.requires_grad_()),
    lambda y: torch.from_numpy(y.numpy().copy()),
    lambda y: torch.tensor(y.tolist(), dtype=y.dtype),
    lambda y: torch.from_dlpack(y),
    lambda y: torch.as_tensor(y),
    lambda y: y.sum().item() * torch.ones(1, dtype=y.dtype),
    copy.deepcopy,
    copy.copy,
    _pickled,
    lambda y: y.data,
    lambda y: y.mT,
    lambda y: y.T,
    lambda y: y.real,
    lambda y: y.contiguous(),
    lambda y: y.double().to(y.dtype),
    lambda y: next(iter(y)),
    lambda y: torch.stack(list(y.unbind(0))),
    lambda y: y.new_zeros(2),
    lambda y: torch.zeros_like(y),
    lambda y: y.view(-1) if y.is_contiguous() else y.flatten(),
    lambda y: torch.utils.data.default_collate([y, y]),
    lambda y: torch.nn.functional.pad(input=y, pad=(1, 1)),
)


def use_output(world: World, r: Random) -> Any:
    """Does this or that with an output, of the network or of a layer."""
    way = r.choice(WAYS)
    layer, shape = world.model, r.choice(world.shapes)
    if world.layers and r.random() < 0.5:
        name = r.choice(sorted(world.layers))
        layer, shape = world.model.get_submodule(name), world.layers[name]
    with torch.no_grad():
        y = layer(world.draw(r, shape))
        ys = list(tensors_in(y))
        return [[way(each), each] for each in ys]


def write_to_output(world: World, r: Random) -> Any:
    """Changes an output in place before the backward pass."""
    world.model.zero_grad()
    x = world.input(r)
    (y, *_) = tensors_in(world.model(x))
    change = r.choice((lambda y: y.mul_(2), lambda y: y.relu_(), lambda y: y.add_(1), lambda y: y[..., :1].mul_(0)))
    change(y)
    _loss(y, r, world).backward()
    return y.detach()


# -------------------------------------------------------------------------------------------------------- weights


def _values(world: World, r: Random) -> dict[str, Tensor]:
    """Other values for the state: scaled, turned, or with other zeros where nobody holds them."""
    found = {}
    for name, value in world.model.state_dict().items():
        factor = r.choice((0.5, -1.0, 1.5))
        if not value.is_floating_point() or "running" in name or "_u" in name or "_v" in name:
            found[name] = value.clone()
            continue
        found[name] = value * factor
        if value.ndim > 1 and not world.sparsifier:
            match r.randrange(4):
                case 0:
                    found[name] = world.draw(r, value.shape) * 0.3
                case 1:
                    found[name] = value * (world.draw(r, value.shape) > 0)
                case 2:
                    found[name] = value * (world.draw(r, value.shape[:2]) > 0).reshape(
                        *value.shape[:2], *[1] * (value.ndim - 2)
                    )
    return found


def load(world: World, r: Random) -> Any:
    target = r.choice((world.model, world.home))
    target.load_state_dict(_values(world, r))
    return _look(world, r)


def load_by_assignment(world: World, r: Random) -> Any:
    """Puts loaded parameters in the place of all; a sparsifier asks for one of the new model."""
    if world.sparsifier:
        return None
    target, values = r.choice((world.model, world.home)), _values(world, r)
    target.load_state_dict(values, assign=True)
    if target is world.model:
        world.home = world.model
    return _look(world, r)


def write(world: World, r: Random) -> Any:
    """Writes values into the parameters, of the plain model or of the fast one."""
    values, target = _values(world, r), r.choice((world.model, world.home))
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if r.random() < 0.7:
                parameter.copy_(values.get(name, parameter))
    return _look(world, r)


def write_unseen(world: World, r: Random) -> Any:
    """Writes through ``.data``, which torch does not count, and begins or ends training, as a swap does."""
    values, target = _values(world, r), r.choice((world.model, world.home))
    for name, parameter in target.named_parameters():
        if r.random() < 0.7:
            parameter.data.copy_(values.get(name, parameter))
    world.model.train(r.random() < 0.5)
    return _look(world, r)


def exchange_data(world: World, r: Random) -> Any:
    """Puts other memory under a parameter, ``.data =``."""
    values, target = _values(world, r), r.choice((world.model, world.home))
    for name, parameter in target.named_parameters():
        if r.random() < 0.7:
            parameter.data = values.get(name, parameter.detach()).clone()
    return _look(world, r)


def swap_tensors(world: World, r: Random) -> Any:
    values, target = _values(world, r), r.choice((world.model, world.home))
    world.model.zero_grad()
    for name, parameter in list(target.named_parameters()):
        if r.random() < 0.5 and name in values:
            try:
                torch.utils.swap_tensors(parameter, nn.Parameter(values[name].clone()))
            except RuntimeError:  # somebody else holds it, as a graph that is kept may
                parameter.data = values[name].clone()
    return _look(world, r)


def _scale(world: World, r: Random) -> None:
    """Multiplies the weights in place, as a step does."""
    with torch.no_grad():
        for parameter in r.choice((world.model, world.home)).parameters():
            parameter.mul_(r.choice((0.5, -1.0)))


def write_a_little(world: World, r: Random) -> Any:
    """Writes one number, between passes."""
    before = _look(world, r)
    parameters = [p for p in world.home.parameters() if p.numel()]
    if parameters:
        with torch.no_grad():
            r.choice(parameters).view(-1)[0].mul_(-3)
    return [before, _look(world, r)]


def replace_parameter(world: World, r: Random) -> Any:
    """Puts another parameter in the place of one; a sparsifier asks for one of the new model."""
    if world.sparsifier:
        return None
    target = r.choice((world.model, world.home))
    names = sorted(name for name, _ in target.named_parameters())
    if names:
        path, _, key = r.choice(names).rpartition(".")
        owner = target.get_submodule(path)
        setattr(owner, key, nn.Parameter(getattr(owner, key).detach() * 0.5))
        if target is world.model:
            world.home = world.model
    return _look(world, r)


def replace_layer(world: World, r: Random) -> Any:
    """Puts another layer of the same kind in the place of one, in the model that is called or in the plain one."""
    # hooks hang on the fast one, and would be copied from the plain one; a sparsifier asks for one of the new model
    if not world.layers or world.handles or world.sparsifier:
        return None
    name, target = r.choice(sorted(world.layers)), r.choice((world.model, world.home))
    layer = copy.deepcopy(world.home.get_submodule(name))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    target.set_submodule(name, layer)
    if target is world.model:
        world.home = world.model
    return _look(world, r)


def freeze(world: World, r: Random) -> Any:
    """Trains a part."""
    for parameter in world.model.parameters():
        parameter.requires_grad_(r.random() < 0.5)
    try:
        if any(parameter.requires_grad for parameter in world.model.parameters()):
            _loss(world.model(world.input(r)), r, world).backward()
        return _look(world, r)
    finally:
        world.model.requires_grad_(True)


def share_memory(world: World, r: Random) -> Any:
    r.choice((world.model, world.home)).share_memory()
    return _look(world, r)


def other_type(world: World, r: Random) -> Any:
    """Goes to double precision and back."""
    world.model.double()
    x = world.input(r).double()
    with _recording(r):
        y = [x.to(world.dtype) for x in tensors_in(world.model(x))]
    world.model.to(world.dtype)
    if any(x.is_floating_point() for x in world.model.buffers()):
        world.home = world.model  # to() puts others in the place of buffers, which the plain model does not share
    return [y, _look(world, r)]


def average(world: World, r: Random) -> Any:
    """torch's own average of the weights, evaluated, and perhaps swapped in."""
    averaged = AveragedModel(world.model, use_buffers=r.random() < 0.5)
    with torch.no_grad():
        averaged(world.input(r))
    _scale(world, r)
    averaged.update_parameters(world.model)
    averaged.update_parameters(world.model)
    averaged.train(r.random() < 0.3)
    with _recording(r):
        y = averaged(world.input(r))
    if r.random() < 0.5:
        with torch.no_grad():
            for ours, theirs in zip(world.model.parameters(), averaged.module.parameters(), strict=True):
                ours.copy_(theirs)
    return [y, _look(world, r)]


def train_the_plain_one(world: World, r: Random) -> Any:
    """Steps by the plain model, whose parameters the fast one shares, but not the hooks."""
    if world.handles:
        return None
    world.copy_modes()
    optimizer = torch.optim.SGD(world.home.parameters(), lr=0.05)
    optimizer.zero_grad()
    _loss(world.home(world.input(r)), r, world).backward()
    optimizer.step()
    return _look(world, r)


# --------------------------------------------------------------------------------------------------------- modules


def change_mode(world: World, r: Random) -> Any:
    mode = r.random() < 0.5
    match r.randrange(4):
        case 0:
            world.model.train(mode)
        case 1:
            world.model.training = mode
        case 2:
            for module in world.model.modules():
                module.training = mode
        case 3 if world.layers:
            world.model.get_submodule(r.choice(sorted(world.layers))).train(mode)
    return _look(world, r)


def go_on_with_a_copy(world: World, r: Random) -> Any:
    """deepcopy, together with the sparsifier where there is one."""
    if r.random() < 0.5:
        _look(world, r)
    old = world.model
    world.model, world.sparsifier = copy.deepcopy((world.model, world.sparsifier))
    world.home = world.model
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.zero_()
    return _look(world, r)


def copy_aside(world: World, r: Random) -> Any:
    """A copy that is given other weights, while the life goes on with the original."""
    if r.random() < 0.5:
        _look(world, r)
    other = copy.deepcopy(world.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    with _recording(r):
        y = other(world.input(r))
    return [y, _look(world, r)]


def go_on_unpickled(world: World, r: Random) -> Any:
    """Saved whole and read again, by pickle or by torch, together with the sparsifier."""
    if r.random() < 0.5:
        _look(world, r)
    both = world.model, world.sparsifier
    world.model, world.sparsifier = _pickled(both) if r.random() < 0.5 else pickle.loads(pickle.dumps(both))
    world.home = world.model
    return _look(world, r)


def accelerate_again(world: World, r: Random) -> Any:
    """Puts the plain model on the engine a second time."""
    old = world.model
    if world.home is not world.model and not world.handles:  # hooks hang on the fast one
        world.accelerate()
    with torch.no_grad():
        old(world.input(r))
    return _look(world, r)


def hook(world: World, r: Random) -> Any:
    """Hangs a hook on a module of the model that is called."""
    names = ["", *sorted(world.layers)]
    name = r.choice(names)
    if r.random() < 0.3:
        parts = sorted(f"{name}.{n}" if name else n for n, _ in world.home.get_submodule(name).named_children())
        name = r.choice(parts) if parts else name
    made = Times(r.choice((0.5, 2.0)), r.choice(HOOKS))
    world.handles.append(made.register(world.model.get_submodule(name)))
    world.model.zero_grad()
    y = world.model(world.input(r))
    _loss(y, r, world).backward()
    return [[x.detach() for x in tensors_in(y)], _look(world, r)]


def unhook(world: World, r: Random) -> Any:
    if world.handles:
        world.handles.pop().remove()
    return _look(world, r)


def attributes(world: World, r: Random) -> Any:
    """Reads what layers say of themselves."""
    for name, facts in world.facts.items():
        layer = world.model.get_submodule(name)
        said = {key: getattr(layer, key) for key in facts}
        if said != facts:
            raise AttributeError(f"{name}: {said}, not {facts}")
    return None


def trace(world: World, r: Random) -> Any:
    """A traced model, called with another input."""
    world.model.eval()
    x = world.draw(r, world.shapes[0])
    with torch.no_grad():
        traced = torch.jit.trace(world.model, x, check_trace=False)
        return [traced(world.draw(r, world.shapes[0])), _look(world, r)]


def compiled(world: World, r: Random) -> Any:
    """The model by torch.compile, with gradients and without."""
    torch.compiler.reset()
    made = torch.compile(world.model, backend="aot_eager")
    x = world.input(r)
    world.model.zero_grad()
    loss = _loss(made(x), r, world)
    loss.backward()
    with torch.no_grad():
        return [loss.detach(), made(x), _look(world, r)]


FAST = (
    evaluate, train, accumulate, backward_twice, input_gradient, second_gradient, forward_gradient, mapped,
    functional_gradient, functional, checkpointed, threads, layer_alone, half_precision, strides, other_inputs,
    wrong_inputs, wrong_layer_inputs, use_output, write_to_output, load, load_by_assignment, write, write_unseen,
    exchange_data, swap_tensors, write_a_little, replace_parameter, replace_layer, freeze, share_memory, other_type,
    average, train_the_plain_one, change_mode, go_on_with_a_copy, copy_aside, go_on_unpickled, accelerate_again, hook,
    unhook, attributes, trace,
)  # fmt: skip
EVENTS = {each.__name__: each for each in FAST}
ALL = {**EVENTS, "compiled": compiled}  # what takes seconds, too
