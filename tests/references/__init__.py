"""What each preset does, once more in NumPy, from the papers and their authors' programs.

Written apart from the library, by someone who has not read its code. A preset joins by its entry in ``REFERENCES``.
"""

import math
from dataclasses import replace
from functools import partial

from . import exchange, shared, structured
from .bench import Chance, Reference, Run
from .counts import Shapes, dense, erk, uniform, uniform_but_for_ends
from .exchange import per_layer


def half(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return erk(shapes, 0.5)


def half_of_each(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return uniform(shapes, 0.5)


def threefold(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return erk(shapes, max(round(1 - 3 * (1 - sparsity), 9), 0.0))


def with_surplus(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return {
        name: min(1.5 * num, math.prod(shapes[name])) for name, num in uniform_but_for_ends(shapes, sparsity).items()
    }


OF_FOUR = Reference(uniform, structured.two_of_four, every=1, until=1.0, interval=1, sparsities=(0.5,), stored=True)

REFERENCES = {
    "static": Reference(erk, None, every=None),
    "set": Reference(erk, exchange.set_),
    "set_itop": Reference(erk, exchange.set_itop, every=1500, until=1.0),
    "rigl": Reference(erk, exchange.rigl),
    "rigl_itop": Reference(erk, exchange.rigl_itop, every=4000, until=1.0),
    "gse": Reference(erk, exchange.gse, until=0.6),
    "seft": Reference(uniform, exchange.seft, until=1.0, interval=6),
    "cyclic": Reference(erk, exchange.cyclic, start=threefold, first=erk, until=1.0, interval=1, updates=20),
    "snfs": Reference(uniform, shared.snfs),
    "dsr": Reference(uniform, shared.dsr, interval=1, updates=14),
    "mest": Reference(uniform_but_for_ends, exchange.mest, layers=4),
    "mest_soft": Reference(uniform_but_for_ends, exchange.mest_soft, first=with_surplus, layers=4),
    "gmp": Reference(uniform, shared.gmp, start=dense),
    "gmp_global": Reference(uniform, shared.gmp_global, start=dense),
    "acdc": Reference(erk, shared.acdc, start=dense, every=0.05, until=1.0, interval=1, updates=20, resets=True),
    "srigl": Reference(
        structured.constant_fan_in, per_layer(structured.srigl), check_first=structured.outputs_are_alike
    ),
    "granet": Reference(erk, shared.granet, start=dense, until=1.0),
    "granet_sparse": Reference(erk, shared.granet, start=half, until=1.0),
    "cht": Reference(uniform, structured.cht),
    "chts": Reference(uniform, structured.chts, check_first=structured.outputs_are_alike),
    "chtss": Reference(uniform, structured.chtss, start=half_of_each, check_first=structured.outputs_are_alike),
    "topkast": Reference(
        uniform, structured.topkast, every=1, until=1.0, interval=1, learn=structured.topkast_learns, stored=True
    ),
    "srste": replace(OF_FOUR, learn=structured.srste_learns),
    "sste": replace(OF_FOUR, learn=structured.sste_learns, shows=structured.sste_shows),
    "dsff": Reference(structured.kernels, structured.dsff, every=1200, until=1.0),
}

TRANSFORMERS = replace(REFERENCES["srigl"], update=per_layer(partial(structured.srigl, gamma=0.95)))

__all__ = ["REFERENCES", "TRANSFORMERS", "Chance", "Reference", "Run"]
