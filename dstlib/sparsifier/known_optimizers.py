"""What known optimizers keep for a weight, by their keys: a table of values, each with the package that was read.

A row is for exceptions: what bears the name of a moment (``MOMENTS``) is one unless a row above says otherwise, and
a key that no row knows is observed (``optimizer_state.py``). The first row that fits class and key is taken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["moment", "accumulator", "weights", "other"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Meaning:
    """What something is that an optimizer keeps for each entry of a weight, and how an entry of it is born.

    A "moment" is zero at birth, an "accumulator" (a step size, too) has the value ``birth``: a number, or a function
    of the parameter's group. "weights" are a copy of the weights: born as what they copy. "other" is not of single
    entries, such as a preconditioner, and is left alone. ``first`` gives what the entries of a grown weight start
    from where an optimizer makes it of its first gradient. ``power`` is that of the gradient's size with which grows
    what steps are divided by, 2 for a mean of squares; None: steps are not divided by it.
    """

    kind: Kind
    birth: float | Callable[[Mapping[str, Any]], float] = 0.0
    first: Callable[[Tensor], Tensor] | None = None
    power: int | None = None


@dataclass(frozen=True)
class Known:
    """The keys of some classes: ``classes`` are globs over qualified names, keys are globs too."""

    source: str
    classes: tuple[str, ...]
    keys: Mapping[str, Meaning]


MOMENT = Meaning("moment")
SQUARES = Meaning("moment", power=2)
WEIGHTS = Meaning("weights")
OTHER = Meaning("other")


def _setting(name: str, power: int | None = None) -> Meaning:
    """Returns an accumulator that is born as a setting of its group."""
    return Meaning("accumulator", lambda group: float(group[name]), power=power)


def _all(meaning: Meaning, keys: str) -> dict[str, Meaning]:
    return dict.fromkeys(keys.split(), meaning)


def _vsgd(prior: str) -> Meaning:
    """Returns the variance by which VSGD's second step divides as its first step does: it is made of the prior."""
    return Meaning("accumulator", lambda group: group[prior] * group["pa2"] / (group["pa2"] - 1))


# What torch calls its moments, and everyone after it; those quantised in a way that zero is the code of zero, too.
MOMENTS = {
    **_all(SQUARES, "exp_avg_sq max_exp_avg_sq exp_avg_var max_exp_avg_var square_avg sum grad_sum_sq"),
    "exp_inf": Meaning("moment", power=1),
    **_all(
        MOMENT,
        "exp_avg exp_avg_diff exp_avg_slow exp_avg_lr exp_avg_grad exp_hessian_diag_sq neg_exp_avg grok_exp_avg "
        "momentum momentum_buffer momentum_buffer.* moments pos_momentum neg_momentum grad_avg acc_delta grad_buffer "
        "i_buffer d_buffer previous_grad last_grad approx_hessian update exp_avg::quantized exp_avg_sq::quantized",
    ),
}

KNOWN = (
    Known("torch 2.13", ("torch.optim.adagrad.Adagrad",), {"sum": _setting("initial_accumulator_value", 2)}),
    Known("torch 2.13", ("torch.optim.rprop.Rprop",), {"step_size": _setting("lr"), "prev": MOMENT}),
    Known("torch 2.13", ("torch.optim.asgd.ASGD",), {"ax": WEIGHTS}),
    Known(
        "wrappers around any optimizer: timm 1.0.31, torch_optimizer 0.3.0, pytorch_optimizer 4.1.0",
        ("*",),
        _all(WEIGHTS, "lookahead_slow_buff slow_param slow_params backup_params old_p trac"),
    ),
    Known("wrappers around torch's optimizers: schedulefree 1.4.1", ("torch.optim.*",), _all(WEIGHTS, "z x y")),
    Known("timm 1.0.31", ("timm.optim.rmsprop_tf.RMSpropTF",), {"square_avg": Meaning("accumulator", 1.0, power=2)}),
    Known("timm 1.0.31", ("timm.optim.adan.Adan",), {"neg_pre_grad": Meaning("moment", first=torch.neg)}),
    Known(
        "timm 1.0.31, pytorch_optimizer 4.1.0",
        ("timm.optim.adopt.Adopt", "pytorch_optimizer.*.ADOPT"),
        {"exp_avg_sq": Meaning("accumulator", first=torch.square)},
    ),
    Known("heavyball 3.2.1", ("heavyball.ADOPT",), {"*_exp_avg_sq_*": Meaning("accumulator", first=torch.square)}),
    Known(
        "heavyball 3.2.1: the number of a view, then function, name and place in the chain",
        ("heavyball.*",),
        {
            **_all(WEIGHTS, "*schedule_free_z_* *msam_z_* *weight_decay_to_init_* *weight_decay_to_ema_exp_avg_*"),
            **_all(OTHER, "*_soap_* *_lather_* *_suds_exp_avg_*"),  # in a rotated basis
            "*_exp_avg_sq_*": SQUARES,
            **_all(MOMENT, "*_exp_avg_* *_momentum_* *_fisher_approx_* *_old_grad_*"),
        },
    ),
    Known(
        "timm 1.0.31, torch_optimizer 0.3.0, pytorch_optimizer 4.1.0, dadaptation 3.2",
        ("timm.*", "torch_optimizer.*", "pytorch_optimizer.*", "*.DAdapt*"),
        {"x0": WEIGHTS},
    ),
    Known(
        "pytorch_ranger 0.1.1, pytorch_optimizer 4.1.0", ("*.Ranger*",), _all(WEIGHTS, "slow_buffer lookahead_params")
    ),
    Known(
        "schedulefree 1.4.1, pytorch_optimizer 4.1.0, dadaptation 3.2",
        ("schedulefree.*", "pytorch_optimizer.*.ScheduleFree*", "*.DAdaptSGD"),
        _all(WEIGHTS, "z x y"),
    ),
    Known(
        "torch_optimizer 0.3.0, pytorch_optimizer 4.1.0: the weights, moved by long steps",
        ("torch_optimizer.*.AccSGD", "pytorch_optimizer.*.AccSGD"),
        {"momentum_buffer": WEIGHTS},
    ),
    Known(
        "torch_optimizer 0.3.0, pytorch_optimizer 4.1.0",
        ("torch_optimizer.*.Yogi", "pytorch_optimizer.*.Yogi"),
        {"exp_avg": _setting("initial_accumulator"), "exp_avg_sq": _setting("initial_accumulator", 2)},
    ),
    Known(
        "torch_optimizer 0.3.0, pytorch_optimizer 4.1.0",
        ("torch_optimizer.a2grad.*", "pytorch_optimizer.*.A2Grad"),
        {"avg_grad": Meaning("moment", first=torch.clone), "x_k": WEIGHTS},
    ),
    Known("torch_optimizer 0.3.0", ("torch_optimizer.pid.PID",), {"grad_buffer": Meaning("moment", first=torch.clone)}),
    Known(
        "torch_optimizer 0.3.0, pytorch_optimizer 4.1.0: what is preconditioned is of no single entry",
        ("torch_optimizer.shampoo.Shampoo", "pytorch_optimizer.*.Shampoo"),
        {"*": OTHER},
    ),
    Known("dadaptation 3.2", ("dadaptation.*.DAdaptAdan",), {"pre_grad": Meaning("moment", first=torch.clone)}),
    Known(
        "dadaptation 3.2, pytorch_optimizer 4.1.0",
        ("*.DAdaptAdaGrad",),
        {**_all(Meaning("accumulator", 1e-6, power=2), "alphak alpha_k"), "sk": MOMENT},
    ),
    Known("prodigyopt 1.1.2, pytorch_optimizer 4.1.0", ("*.Prodigy",), {"p0": WEIGHTS}),
    Known("pytorch_optimizer 4.1.0", ("*.VSGD",), {"mug": MOMENT, "bg": _vsgd("pbg2"), "bhg": _vsgd("pbhg2")}),
    Known("pytorch_optimizer 4.1.0", ("*.Adai",), {"beta1_prod": Meaning("accumulator", 1.0)}),
    Known("pytorch_optimizer 4.1.0", ("*.BSAM",), {"s": Meaning("accumulator", 1.0), "noisy_gradient": MOMENT}),
    Known(
        "pytorch_optimizer 4.1.0",
        ("pytorch_optimizer.*.Adan", "pytorch_optimizer.*.DAdaptAdan"),
        {"previous_grad": Meaning("moment", first=torch.neg)},
    ),
    Known(
        "pytorch_optimizer 4.1.0: in a rotated basis",
        ("pytorch_optimizer.*.SOAP", "pytorch_optimizer.*.Conda"),
        {"exp_avg_sq": OTHER},
    ),
    Known("pytorch_optimizer 4.1.0: of a subspace", ("pytorch_optimizer.*.Alice",), {"*": OTHER}),
    Known("pytorch_optimizer 4.1.0: of the orthogonalised update", ("pytorch_optimizer.*.AdaMuon",), {"v": OTHER}),
    Known(
        "pytorch_optimizer 4.1.0",
        ("pytorch_optimizer.*",),
        {
            **_all(MOMENT, "m v r z n b d sk fim hessian hessian_moment grad_ma neg_grad_ma variance_ma"),
            **_all(MOMENT, "max_variance_ma grad_queue.* mov_avg_grad sharpness gv old_grad_p"),
            **_all(WEIGHTS, "ema param_buffer shadow prev_param pbar mov_avg_param"),
        },
    ),
    Known(
        "bitsandbytes 0.50.2: with one state",
        tuple(f"bitsandbytes.*.{name}*" for name in ("RMSprop", "Adagrad")),
        {"state1": SQUARES},
    ),
    Known("bitsandbytes 0.50.2", ("bitsandbytes.*",), {"state1": MOMENT, "state2": SQUARES}),
    Known(
        "torch 2.13, timm 1.0.31, torch_optimizer 0.3.0, pytorch_optimizer 4.1.0, schedulefree 1.4.1, bitsandbytes "
        "0.50.2, torchao 0.18.0, dadaptation 3.2, prodigyopt 1.1.2, lion-pytorch 0.2.5, galore-torch 1.0, "
        "came-pytorch 0.1.3, adabelief-pytorch 0.2.1",
        tuple(
            f"{package}.*"
            for package in (
                *("torch.optim", "timm", "torch_optimizer", "pytorch_ranger", "pytorch_optimizer", "schedulefree"),
                *("bitsandbytes", "torchao", "dadaptation", "prodigyopt", "lion_pytorch", "galore_torch"),
                *("came_pytorch", "adabelief_pytorch"),
            )
        ),
        {**MOMENTS, "s": MOMENT},
    ),
)


# whose step does the same to entries of a tensor that are the same, with the same gradients and the same state
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
)


@lru_cache(maxsize=1024)
def known(optimizer: type, key: str) -> Meaning | None:
    """Returns what a key of an optimizer of this class, or of one derived from it, means; None if no row knows.

    >>> known(torch.optim.AdamW, "exp_avg").kind, known(torch.optim.Rprop, "step_size").birth({"lr": 0.01})
    ('moment', 0.01)
    """
    for cls in optimizer.__mro__[: optimizer.__mro__.index(torch.optim.Optimizer)]:
        name = f"{cls.__module__}.{cls.__qualname__}"
        for row in KNOWN:
            if any(fnmatchcase(name, pattern) for pattern in row.classes):
                for pattern, meaning in row.keys.items():
                    if fnmatchcase(key, pattern):
                        return meaning
    return None
