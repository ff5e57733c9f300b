"""The systems that the paper compares, as values: which network, trained on what, with which further options.

Nothing heavy is imported here, and nothing is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from dstlib.errors import require, similar
from dstlib.zoo.e2enet.config import E2ENetConfig

Source = Literal["set", "mri", "both"]
ONE_WIDTH = ("e2enet", "e2enet_plus", "vnet")  # models that are built in one width


@dataclass(frozen=True, kw_only=True)
class System:
    """A row's network and how it is trained, beside what all rows have in common.

    - ``name``: by which it is chosen; ``title`` is how a table calls it, where the paper has no such row.
    - ``model``: one of the baselines' table; ``options`` are further ones of a recipe's command line.
    - ``network``: changes of the E2ENet's config.
    - ``interval``: between mask updates, as a multiple of the preset's.
    - ``source``: the scans it learns from: the set's, or those of Table 6.
    - ``base``: the system from whose weights and masks it goes on, shorter.
    - ``search``: the system that finds its architecture, where none is given.
    - ``reason``: why there is nothing to run.
    """

    name: str
    title: str
    model: str = "e2enet"
    options: tuple[str, ...] = ()
    network: Mapping[str, object] = field(default_factory=dict, hash=False)
    interval: float = 1.0
    source: Source = "set"
    base: str = ""
    search: str = ""
    reason: str = ""

    @property
    def sparsity(self) -> float:
        """That of the fusion's connections; 0 of a dense network."""
        return float(self.options[self.options.index("--sparsity") + 1]) if "--sparsity" in self.options else 0.0

    @property
    def has_updates(self) -> bool:
        """Whether its masks are updated."""
        return self.sparsity > 0 and not {"static", "--freeze-topology"} & {*self.options}

    def changed(self, network: E2ENetConfig) -> E2ENetConfig:
        """Returns a network with the changes of the system."""
        return replace(network, **self.network)  # type: ignore[arg-type]


_OUTER = {"outer_kernel_size": (3, 3, 3), "shift": None}
_HEIGHT, _WIDTH = {"kernel_size": (3, 1, 3)}, {"kernel_size": (3, 3, 1)}
_S07, _S08, _DENSE = (("--sparsity", value) for value in ("0.7", "0.8", "0"))
_NOT_PUBLISHED = "its authors published no code"
_BASELINES = {
    "cotr": "CoTr",
    "nnformer": "nnFormer",
    "unetr": "UNETR",
    "swin_unetr": "Swin UNETR",
    "vnet": "V-Net",
    "medformer": "MedFormer",
    "unet_plus_plus": "UNet++",
    "deeplabv3": "DeepLabv3",
    "nnunet": "nnU-Net",
    "resenc_m": "nnU-Net ResEnc M",
    "resenc_l": "nnU-Net ResEnc L",
    "mednext_s": "MedNeXt S",
    "mednext_b": "MedNeXt B",
    "umamba": "U-Mamba",
}
_OF_MRI = ("nnunet", "vnet", "nnformer", "cotr", "swin_unetr", "unetr")
_SOURCES: Mapping[Source, str] = {"mri": "MRI only", "both": "CT + MRI"}

_ALL = (
    *(System(name=f"e2enet-{s:g}", title=f"E2ENet s={s:g}", options=("--sparsity", f"{s:g}")) for s in (0.7, 0.8, 0.9)),
    System(name="e2enet-dense", title="E2ENet, dense", options=_DENSE),
    System(
        name="e2enet-static-0.9",
        title="E2ENet static s=0.9",
        options=("--sparsity", "0.9", "--method", "static"),
    ),
    *(System(name=name, title=title, model=name) for name, title in _BASELINES.items()),
    System(name="dints-search", title="DiNTS, its search", model="dints_search"),
    System(name="dints", title="DiNTS", model="dints", search="dints-search"),
    System(name="nnunet-minus", title="nnU-Net(-)", model="nnunet_minus"),
    System(name="e2enet-plus", title="E2ENet(+)", model="e2enet_plus", options=_S08),
    System(name="pann", title="PaNN", reason=_NOT_PUBLISHED),
    System(name="randompatch", title="RandomPatch", reason=_NOT_PUBLISHED),
    System(name="dense-no-shift", title="no DSFF, no shift", options=_DENSE, network={"shift": None}),
    System(name="dsff-no-shift", title="DSFF, no shift", options=_S07, network={"shift": None}),
    *(
        System(name=f"shift-{n}", title=f"DSFF, shift (-{n}, 0, {n})", options=_S07, network={"shift": (-n, 0, n)})
        for n in (2, 3, 7)
    ),
    System(name="dense-3x3x3", title="no DSFF, 3×3×3", options=_DENSE, network=_OUTER),
    System(name="dsff-3x3x3", title="DSFF, 3×3×3", options=_S07, network=_OUTER),
    System(name="every-600", title="DSFF, ΔT 600", options=_S07, interval=1 / 2),
    System(name="every-1800", title="DSFF, ΔT 1800", options=_S07, interval=3 / 2),
    System(name="flat-height", title="DSFF, no shift, 3×1×3", options=_S07, network={**_HEIGHT, "shift": None}),
    System(name="flat-width", title="DSFF, no shift, 3×3×1", options=_S07, network={**_WIDTH, "shift": None}),
    System(
        name="shift-height",
        title="DSFF, shift along height, 3×1×3",
        options=_S07,
        network={**_HEIGHT, "shift_axis": "height"},
    ),
    System(
        name="shift-width",
        title="DSFF, shift along width, 3×3×1",
        options=_S07,
        network={**_WIDTH, "shift_axis": "width"},
    ),
    System(
        name="transfer-e2enet",
        title="E2ENet s=0.8, CT → MRI",
        options=(*_S08, "--freeze-topology"),
        source="mri",
        base="e2enet-0.8",
    ),
    System(name="transfer-nnunet", title="nnU-Net, CT → MRI", model="nnunet", source="mri", base="nnunet"),
    *(
        System(name=f"{source}-{model}", title=f"{_BASELINES[model]}, {told}", model=model, source=source)
        for source, told in _SOURCES.items()
        for model in _OF_MRI
    ),
)

SYSTEMS: Mapping[str, System] = MappingProxyType({system.name: system for system in _ALL})
"""Every system by its name."""


def chosen(names: Sequence[str]) -> tuple[System, ...]:
    """Returns the systems of these names, each once.

    Raises:
        SettingError: There is no such system.
    """
    for name in names:
        alike = f"Similar: {similar(name, SYSTEMS)}."
        require(name in SYSTEMS, "--rows", "the command line", allowed="names of rows", given=repr(name), remedy=alike)
    return tuple(SYSTEMS[name] for name in dict.fromkeys(names))


def refusal(system: System) -> str:
    """Says why a system cannot be run in this build; "" where it can.

    >>> refusal(SYSTEMS["pann"]), refusal(SYSTEMS["e2enet-0.8"])
    ('its authors published no code', '')
    """
    from dstlib.zoo.e2enet.baselines.table import BASELINES  # torch with it

    if system.reason:
        return system.reason
    baseline = BASELINES.get(system.model)
    if baseline is None:
        return "not in this build"
    return baseline.reason or ""
