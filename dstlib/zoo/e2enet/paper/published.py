"""What the E2ENet paper prints, as it prints it, and which of its numbers not to rely on.

Scores are per cent, params millions, FLOPs 10⁹ of one patch by the paper's counting rules
(``dstlib.profile(..., convention="paper")``), with all strides 2 and the foreground classes alone as output.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dstlib.zoo.e2enet.evaluation.pt_score import Row

PAPER = "Wu et al., NeurIPS 2024 (arXiv:2312.04727)"
MARKS = MappingProxyType({"~": "about", "?": "hardly legible in our scan of the paper", "!": "contradicts itself"})
Set = Literal["amos", "brats", "btcv"]

_NUMBER = re.compile(r"~?(\d+(?:\.\d+)?)[?!]?")
_AMOS_ORGANS = "Spl RKid LKid Gall Eso Liv Sto Aor IVC Pan RAG LAG Duo Bla P/U"
_BTCV_ORGANS = "Spl RKid LKid Gall Eso Liv Sto Aor IVC Veins Pan AG"
_COST = "Params FLOPs"


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A row of a table: ``values`` by column as they are printed, with :data:`MARKS` at those not to rely on.

    ``system`` is what :mod:`.systems` calls the network of the row, ``is_post_processed`` whether its predictions were
    reduced to the largest component of some classes.

    >>> row = Printed(system="e2enet-plus", name="E2ENet(+)", values={"mDice": "90.4", "Params": "10.37!"})
    >>> row.number("mDice"), row.number("Params"), row.number("PT")
    (90.4, 10.37, None)
    """

    system: str
    name: str
    values: Mapping[str, str]
    is_post_processed: bool = False

    def number(self, column: str) -> float | None:
        """Returns the number in a column; None where there is none, or not all of its digits can be read."""
        found = _NUMBER.fullmatch(self.values.get(column, ""))
        return float(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class PrintedTable:
    """A table of the paper: what is in it, ``classes`` and ``measures`` as its columns, and what to know of it.

    ``classes`` stand in the order of the set's labels; ``notes`` say what the marks mean here.
    """

    number: int
    title: str
    data: Set
    measures: tuple[str, ...]
    rows: tuple[Printed, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.classes, *self.measures)


def _rows(columns: str, text: str) -> tuple[Printed, ...]:
    """Reads rows "system | name | numbers", in one line or more, "*" behind a system for post-processing.

    >>> [row.number("FLOPs") for row in _rows("Params FLOPs", "vnet | V-Net | 45.65 - | dints | DiNTS | ~3 7!")]
    [None, 7.0]
    """
    parts = [part.strip() for part in text.split("|")]
    return tuple(
        Printed(
            system=system.removesuffix("*"),
            name=name,
            values={
                column: value for column, value in zip(columns.split(), numbers.split(), strict=True) if value != "-"
            },
            is_post_processed=system.endswith("*"),
        )
        for system, name, numbers in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    )


_AMOS_VALIDATION = _rows(
    f"{_AMOS_ORGANS} mDice {_COST} PT mNSD",
    """
cotr | CoTr |
    91.1? 87.2 86.4 60.5 80.9 91.6 80.1 93.7 87.7 76.3 73.7 71.7 68.0 67.4 40.8 77.1 41.87 1510.53 1.07 64.2 |
nnformer | nnFormer |
    95.9 93.5 94.8 78.5 81.1 95.9 89.4 94.2 88.2 85.0 75.0 75.9 78.5 83.9 74.6 85.6 150.14 1343.65 1.12 74.2 |
unetr | UNETR |
    92.7 88.5 90.6 66.5 73.3 94.1 78.7 91.4 84.0 74.5 68.2 65.3 62.4 77.4 67.5 78.3 93.02 391.03 1.41 61.5 |
swin_unetr | Swin UNETR |
    95.5 93.8 94.5 77.3 83.0 96.0 88.9 94.7 89.6 84.9 77.2 78.3 78.6 85.8 77.4 86.4 62.83 1562.99 1.14 75.3 |
vnet | V-Net |
    94.2 91.9 92.7 70.2 79.0 94.7 84.8 93.0 87.4 80.5 72.6 73.2 71.7? 77.0? 66.6 82.0 45.65 1737.57 1.10 67.9 |
nnunet | nnU-Net (site) |
    97.1 96.4 96.2 83.2 87.5 97.6 92.2 96.0 92.5 88.6 81.2 81.7 85.0 90.5 85.0 90.0 30.76 1067.89 1.30 82.1 |
nnunet* | nnU-Net* |
    97.1 97.0 97.1 86.6 87.7 97.9 92.4 96.0 92.7 88.8 81.6 82.1 85.0 90.6 85.2 90.5 30.76 1067.89 1.31 83.0 |
e2enet-0.7* | E2ENet* s=0.7 |
    97.1 96.9 97.1 86.0 87.6 97.9 92.3 95.7 92.3 89.0 81.5 82.3 84.9 90.3 83.8 90.3 11.23 969.32 1.54 82.7 |
e2enet-0.8* | E2ENet* s=0.8 |
    97.1 96.9 97.0 85.2 87.5 97.9 92.3 95.7 92.3 89.0 81.3 82.1 84.6 90.1 84.8 90.3 9.44 778.74 1.65 82.5 |
e2enet-0.9* | E2ENet* s=0.9 |
    96.7 96.9 97.0 84.2 87.0 97.7 92.2 95.6 92.0 88.6 81.0 81.8 84.0 89.9 83.8 89.9 7.64 492.29 1.89 81.8 |
e2enet-0.7 | E2ENet s=0.7 |
    97.1 96.6 96.5 83.4 87.6 97.5 92.3 95.8 92.3 89.0 81.4 82.3 84.9 90.3 83.8 90.1 11.23 969.32 1.54 82.3 |
e2enet-0.8 | E2ENet s=0.8 |
    97.1 96.6 96.5 83.4 87.5 97.5 92.3 95.8 92.3 89.0 81.3 82.0 84.5 90.1 84.8 90.0 9.44 778.74 1.65 82.3 |
e2enet-0.9 | E2ENet s=0.9 |
    96.7 95.4 96.4 82.6 86.9 97.4 92.2 95.6 92.0 88.6 80.9 81.7 84.0 89.9 83.8 89.6 7.64 492.29 1.88 81.4 |
e2enet-static-0.9 | E2ENet static s=0.9 |
    96.6 95.5 96.3 82.6 86.9 97.4 92.2 95.6 92.0 88.6 80.9 81.7 84.0 89.9 83.8 89.6 7.64 492.29 1.88 81.4
""",
)
_BRATS = _rows(
    f"ED ET NET mDice {_COST} PT",
    """
dints | DiNTS | 80.2 61.1 77.6 73.0 - - - |
unet_plus_plus | UNet++ | 80.5 62.5 79.2 74.1 58.38 3938.25 1.12 |
nnunet | nnU-Net | 81.0 62.0 79.3 74.1 31.20 1076.62 1.35 |
e2enet-0.7 | E2ENet s=0.7 | 81.2 62.7 79.5 74.5 11.24 1067.06 1.57 |
e2enet-0.8 | E2ENet s=0.8 | 81.0 62.5 79.0 74.2 9.44 780.97 1.72 |
e2enet-0.9 | E2ENet s=0.9 | 80.9 62.5 79.4 74.3 7.63 494.52 2.00
""",
)
_AMOS_ABLATION = _rows(
    f"mDice {_COST} mNSD",
    """
e2enet-dense | no DSFF, shift (-1, 0, 1), 1×3×3 | 90.2 23.90 3069.55 82.6? |
dense-no-shift | no DSFF, no shift, 1×3×3 | 88.x? 23.90 3069.55 - |
e2enet-0.7 | DSFF, ΔT 1200, shift (-1, 0, 1), 1×3×3 | 90.1 11.23 969.32 82.3 |
dsff-no-shift | DSFF, ΔT 1200, no shift, 1×3×3 | 88.2 11.23 969.32 79.4 |
shift-2 | DSFF, ΔT 1200, shift (-2, 0, 2), 1×3×3 | 89.8 11.23 969.32 82.0 |
shift-3 | DSFF, ΔT 1200, shift (-3, 0, 3), 1×3×3 | 89.7 11.23 969.32 81.6 |
shift-7 | DSFF, ΔT 1200, shift (-7, 0, 7), 1×3×3 | 87.6 11.23 969.32 77.5 |
dense-3x3x3 | no DSFF, no shift, 3×3×3 | 90.2 52.54 4511.57 82.5 |
dsff-3x3x3 | DSFF, ΔT 1200, no shift, 3×3×3 | 90.1 27.97 1778.55 82.1 |
every-600 | DSFF, ΔT 600, shift (-1, 0, 1), 1×3×3 | 90.0 11.23 969.32 82.2 |
every-1800 | DSFF, ΔT 1800, shift (-1, 0, 1), 1×3×3 | 89.9 11.23 969.32 82.0
""",
)
_BRATS_ABLATION = _rows(
    f"ED ET NET mDice {_COST}",
    """
dense-no-shift | 1 no DSFF, no shift, 1×3×3 | 80.4 62.4 79.0 73.9 23.89 3071.78 |
e2enet-dense | 2 no DSFF, shift, 1×3×3 | 81.0 62.3 79.0 74.1 23.89 3071.78 |
dsff-no-shift | 3 DSFF, no shift, 1×3×3 | 80.3 62.5 79.0 73.9 11.24 1067.06 |
e2enet-0.7 | 4 DSFF, shift, 1×3×3 | 81.2 62.7 79.5 74.5 11.24 1067.06 |
dense-3x3x3 | 5 no DSFF, no shift, 3×3×3 | 80.9 61.9 79.1 74.0 52.55 4519.26 |
dsff-3x3x3 | 6 DSFF, no shift, 3×3×3 | 81.0 62.2 79.1 74.1 28.02 2023.52 |
flat-height | 7 DSFF, no shift, 3×1×3 | 80.3 61.7 78.7 73.6 11.24 1067.06 |
flat-width | 8 DSFF, no shift, 3×3×1 | 80.5 61.9 78.7 73.7 - - |
shift-height | 9 DSFF, shift along height, 3×1×3 | 81.1 62.4 78.9 74.1 - - |
shift-width | 10 DSFF, shift along width, 3×3×1 | 81.0 62.3 79.4 74.2 - -
""",
)
_MULTI_SCALE = _rows(
    f"mDice {_COST}",
    """
deeplabv3 | DeepLabv3 | 89.0 74.68 1546.25 |
cotr | CoTr | 77.1 41.87 1510.53 |
medformer | MedFormer | 90.1 ~39.6 ~2332.8 |
e2enet-0.8 | E2ENet s=0.8 | 90.0 9.44 778.74 |
e2enet-0.9 | E2ENet s=0.9 | 89.6 7.64 492.29
""",
)
_MRI = _rows(
    "mDice mNSD",
    """
transfer-e2enet | E2ENet, CT → MRI | 87.8 83.9 |
transfer-nnunet | nnU-Net, CT → MRI | 87.4 83.3 |
mri-nnunet | nnU-Net, MRI only | 81.1? 83.1? |
mri-vnet | V-Net, MRI only | 83.9? 65.8? |
mri-nnformer | nnFormer, MRI only | 80.6? 74.0? |
mri-cotr | CoTr, MRI only | 77.5? 78.0? |
mri-swin_unetr | Swin UNETR, MRI only | 75.7? 65.3? |
mri-unetr | UNETR, MRI only | 75.3? 70.1? |
both-nnunet | nnU-Net, CT + MRI | 81.7? 82.7? |
both-vnet | V-Net, CT + MRI | 75.4? 65.6? |
both-nnformer | nnFormer, CT + MRI | 75.48? 66.63? |
both-cotr | CoTr, CT + MRI | 73.46? 65.35? |
both-swin_unetr | Swin UNETR, CT + MRI | 77.52? 69.10? |
both-unetr | UNETR, CT + MRI | - -
""",
)
_AMOS_TEST = _rows(
    "mDice mNSD",
    """
cotr | CoTr | 80.9 66.3 |
nnformer | nnFormer | 85.6 72.5 |
unetr | UNETR | 79.4 60.8 |
swin_unetr | Swin UNETR | 86.3 73.8 |
vnet | V-Net | 82.9 67.6 |
nnunet | nnU-Net | 90.6 82.0 |
nnunet* | nnU-Net* | 91.0 82.6 |
e2enet-0.7* | E2ENet* s=0.7 | 90.7 82.2 |
e2enet-0.8* | E2ENet* s=0.8 | 90.7 82.1 |
e2enet-0.9* | E2ENet* s=0.9 | 90.4 81.4 |
e2enet-0.7 | E2ENet s=0.7 | 90.6 82.0 |
e2enet-0.8 | E2ENet s=0.8 | 90.4 81.8 |
e2enet-0.9 | E2ENet s=0.9 | 90.1 80.7
""",
)
_SIMILAR_COST = _rows(
    f"mDice {_COST} mNSD",
    """
nnunet | nnU-Net | 90.0 30.76 1067.89 82.1 |
e2enet-0.8 | E2ENet s=0.8 | 90.0 9.44 778.74 82.3 |
nnunet-minus | nnU-Net(-) | 89.7 12.96 755.79 81.0 |
e2enet-plus | E2ENet(+) | 90.4 10.37! 1119.17 82.2
""",
)
_LATENCY = _rows(
    "ms ratio items/s",
    """
nnunet | nnU-Net | 10.07 - 99.19 |
e2enet-0.8 | E2ENet s=0.8 | - 1.26 124.60 |
e2enet-0.9 | E2ENet s=0.9 | - 1.38 137.13
""",
)
_BTCV = _rows(
    f"{_BTCV_ORGANS} mDice {_COST} PT HD",
    """
cotr | CoTr | 95.8 92.1 93.6 70.0 76.4 96.3 85.4 92.0 83.8 78.7 77.5 69.4 84.4! 41.87 636.94 1.22 - |
randompatch | RandomPatch | 96.3 91.2 92.1 74.9 76.0 96.2 87.0 88.9 84.6 78.6 76.2 71.2 84.4 - - - - |
pann | PaNN | 96.6 92.7 95.2 73.2 79.1 97.3 89.1 91.4 85.0 80.5 80.2 65.2 85.4 - - - - |
unetr | UNETR | 96.8 92.4 94.1 75.0 76.6 97.1 91.3 89.0 84.7 78.8 76.7 74.1 85.6 92.79 164.91 1.53 23.4 |
nnunet | nnU-Net (free leaderboard) |
    97.2 91.8 95.8 75.3 84.1 97.7 92.2 92.9 88.1 83.2 85.2 77.8 88.4! 31.18 416.73 1.38 15.6 |
nnunet | nnU-Net (standard leaderboard) |
    96.5 91.7 95.8 78.5 84.2 97.4 91.5 92.3 86.9 83.1 84.9 77.5 88.0! 31.18 416.73 1.38 16.9 |
e2enet-0.7 | E2ENet s=0.7 | 96.5 91.3 95.7 78.1 84.5 97.5 91.5 92.2 86.7 83.4 84.8 77.9 88.3 11.25 449.00 1.68 16.1
""",
)

_ORGAN_COLUMNS, _BTCV_COLUMNS = tuple(_AMOS_ORGANS.split()), tuple(_BTCV_ORGANS.split())
_TUMOUR_COLUMNS = ("ED", "ET", "NET")
_TUMOUR_NOTE = (
    "ED, ET, NET stand as printed: in the order of the set's labels they are edema, non-enhancing, enhancing."
)
_OUTER = "3×3×3 kernels are those of the encoder and of the last diagonal: that is the network with the printed counts."

TABLES: Mapping[int, PrintedTable] = MappingProxyType(
    {
        table.number: table
        for table in (
            PrintedTable(
                number=1,
                title="AMOS-CT, validation set",
                data="amos",
                classes=_ORGAN_COLUMNS,
                measures=("mDice", "Params", "FLOPs", "PT", "mNSD"),
                rows=_AMOS_VALIDATION,
                notes=("The marked numbers of CoTr and V-Net agree with the printed means.",),
            ),
            PrintedTable(
                number=2,
                title="BraTS (MSD Task01), five folds",
                data="brats",
                classes=_TUMOUR_COLUMNS,
                measures=("mDice", "Params", "FLOPs", "PT"),
                rows=_BRATS,
                notes=(_TUMOUR_NOTE,),
            ),
            PrintedTable(
                number=3,
                title="parts of E2ENet, AMOS-CT validation set, s=0.7 with DSFF",
                data="amos",
                measures=("mDice", "Params", "FLOPs", "mNSD"),
                rows=_AMOS_ABLATION,
                notes=(
                    _OUTER,
                    "ΔT is in iterations of the paper's 250,000, and as large a share of a shorter training.",
                ),
            ),
            PrintedTable(
                number=4,
                title="parts of E2ENet, BraTS, five folds, s=0.7 with DSFF",
                data="brats",
                classes=_TUMOUR_COLUMNS,
                measures=("mDice", "Params", "FLOPs"),
                rows=_BRATS_ABLATION,
                notes=(_TUMOUR_NOTE, _OUTER),
            ),
            PrintedTable(
                number=5,
                title="multi-scale methods, AMOS-CT validation set",
                data="amos",
                measures=("mDice", "Params", "FLOPs"),
                rows=_MULTI_SCALE,
                notes=("MedFormer's scores are from its own paper; its costs are overprinted.",),
            ),
            PrintedTable(
                number=6,
                title="AMOS-MRI: from CT, from MRI alone, from both",
                data="amos",
                measures=("mDice", "mNSD"),
                rows=_MRI,
                notes=(
                    "Several numbers of the rows without transfer are printed with a digit lost.",
                    "The paper does not say how sparse its E2ENet is here; ours has s=0.8.",
                ),
            ),
            PrintedTable(
                number=7,
                title="AMOS-CT, test set",
                data="amos",
                measures=("mDice", "mNSD"),
                rows=_AMOS_TEST,
                notes=("The labels of the test set are not public: ours are scores of held-out cases.",),
            ),
            PrintedTable(
                number=8,
                title="networks of similar FLOPs, AMOS-CT validation set",
                data="amos",
                measures=("mDice", "Params", "FLOPs", "mNSD"),
                rows=_SIMILAR_COST,
                notes=("E2ENet(+) cannot have 10.37 M parameters and 1119.17 G at once by the paper's own rules.",),
            ),
            PrintedTable(
                number=9,
                title="latency on a CPU, 1×32³, batch 1",
                data="amos",
                measures=("ms", "ratio", "items/s"),
                rows=_LATENCY,
                notes=("The paper's: DeepSparse on an 18-core Xeon 8360Y. Times differ by machine; compare ratios.",),
            ),
            PrintedTable(
                number=10,
                title="AMOS-CT, validation set, by organ",
                data="amos",
                classes=_ORGAN_COLUMNS,
                measures=("mDice", "Params", "FLOPs", "PT", "mNSD"),
                rows=_AMOS_VALIDATION,
                notes=("The marked numbers of CoTr and V-Net agree with the printed means.",),
            ),
            PrintedTable(
                number=11,
                title="BTCV, test set",
                data="btcv",
                classes=_BTCV_COLUMNS,
                measures=("mDice", "Params", "FLOPs", "PT", "HD"),
                rows=_BTCV,
                notes=(
                    "The labels of the test set are not public: ours are scores of held-out cases.",
                    "AG is the mean of both adrenal glands.",
                    "mDice of CoTr and of nnU-Net (standard) is not the mean of the classes printed, 84.2 and 88.4.",
                    "That of nnU-Net (free) is, but has been read as 88.8 too.",
                ),
            ),
        )
    }
)


def _table_rows(number: int, *, post_processed: bool = False) -> tuple[Row, ...]:
    """Returns rows of a table with what a comparison of runs shows, under names without the mark of post-processing."""
    table = TABLES[number]
    columns = [column for column in (*table.classes, "mNSD") if column in ("mNSD", *_TUMOUR_COLUMNS)]
    source = f"{PAPER}, Table {number}: {table.title}"
    return tuple(
        Row(
            name=row.name.replace("*", ""),
            dice=row.number("mDice"),
            params=row.number("Params"),
            flops=row.number("FLOPs"),
            scores={column: value for column in columns if (value := row.number(column)) is not None},
            source=f"{source}, post-processed" if post_processed else source,
        )
        for row in table.rows
        if row.is_post_processed == post_processed
    )


PUBLISHED: Mapping[str, tuple[Row, ...]] = MappingProxyType(
    {
        "amos": _table_rows(1),
        "amos-post-processed": _table_rows(1, post_processed=True),
        "brats": _table_rows(2),
        "btcv": _table_rows(11),
        "amos-mri": _table_rows(6)[:2],
    }
)
"""What ``compare --beside`` shows: the rows of a set."""
