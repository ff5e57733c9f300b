"""Published results to print beside one's own: rows that were read in their source, and nothing else.

Scores are per cent, params millions, FLOPs 10⁹. The costs of E2ENet are of one 128³ patch by the paper's counting
rules (``dstlib.profile(..., convention="paper")``), with all strides 2 and the foreground classes alone as output.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dstlib.report import align
from dstlib.zoo.e2enet.evaluation.pt_score import Row, pt_scores

PAPER = "Wu et al., NeurIPS 2024 (arXiv:2312.04727)"
_AMOS, _BRATS = f"{PAPER}, AMOS-CT validation", f"{PAPER}, Table 2: BraTS, MSD Task01, five folds"
_FROM_PT = f"{_BRATS}; mDice follows from the row's PT score"


def _amos(name: str, dice: float, nsd: float | None, params: float, flops: float) -> Row:
    scores = {} if nsd is None else {"mNSD": nsd}
    return Row(name=name, dice=dice, params=params, flops=flops, scores=scores, source=_AMOS)


def _brats(name: str, dice: float, params: float, flops: float, *classes: float, source: str = _BRATS) -> Row:
    scores = dict(zip(("ED", "ET", "NET"), classes, strict=True)) if classes else {}
    return Row(name=name, dice=dice, params=params, flops=flops, scores=scores, source=source)


PUBLISHED: Mapping[str, tuple[Row, ...]] = MappingProxyType(
    {
        "amos": (
            _amos("nnU-Net", 90.0, 82.1, 31.21, 1067.89),
            _amos("E2ENet s=0.7", 90.1, 82.3, 11.23, 969.32),
            _amos("E2ENet s=0.8", 90.0, 82.3, 9.44, 778.74),
            _amos("E2ENet s=0.9", 89.6, 81.4, 7.64, 492.29),
        ),
        "amos-post-processed": (
            _amos("E2ENet s=0.7", 90.3, None, 11.23, 969.32),
            _amos("E2ENet s=0.8", 90.3, None, 9.44, 778.74),
            _amos("E2ENet s=0.9", 89.9, None, 7.64, 492.29),
        ),
        "brats": (
            _brats("UNet++", 74.1, 58.38, 3938.25),
            _brats("nnU-Net", 74.1, 31.20, 1076.62, 81.0, 62.0, 79.3),
            _brats("E2ENet s=0.7", 74.5, 11.24, 1067.06, 81.2, 62.7, 79.5),
            _brats("E2ENet s=0.8", 74.2, 9.44, 780.98, source=_FROM_PT),
            _brats("E2ENet s=0.9", 74.3, 7.63, 494.52, source=_FROM_PT),
        ),
        "btcv": (Row(name="E2ENet", dice=88.3, source=f"{PAPER}, BTCV test"),),
        "amos-mri": (
            Row(name="nnU-Net", dice=87.4, source=f"{PAPER}, AMOS CT to MRI"),
            Row(name="E2ENet", dice=87.8, source=f"{PAPER}, AMOS CT to MRI, topology kept, 250 epochs"),
        ),
    }
)


def comparison(rows: Sequence[Row], *, alpha: float = 0.5) -> str:
    """Returns a table of the rows with their PT scores, and their sources below; unknown numbers are a dash.

    Raises:
        DataError: See :func:`pt_scores`.

    >>> print(comparison(PUBLISHED["amos-mri"]).splitlines()[2])
    nnU-Net   87.4          -         -   -  [1]
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.scores))
    sources = list(dict.fromkeys(row.source for row in rows if row.source))
    cells = [("method", "mDice", *columns, "params, M", "FLOPs, G", "PT", "")]
    for row, trade_off in zip(rows, pt_scores(rows, alpha=alpha), strict=True):
        scores = (_number(row.scores.get(column), 1) for column in columns)
        numbers = (_number(row.params, 2), _number(row.flops, 2), _number(trade_off, 4))
        mark = f"[{sources.index(row.source) + 1}]" if row.source else ""
        cells.append((row.name, _number(row.dice, 1), *scores, *numbers, mark))
    score = f"mDice / highest mDice + {alpha:g} (fewest params / params + fewest FLOPs / FLOPs)"
    note = f"Scores in per cent. PT = {score}, over the rows shown."
    listed = [f"[{i}] {source}" for i, source in enumerate(sources, start=1)]
    return "\n".join([*align(cells, left=(0,)), note, *listed])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
