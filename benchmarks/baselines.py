"""What each baseline costs beside what was published of it: parameters, and FLOPs of one forward pass.

    python benchmarks/baselines.py

AMOS is 1×128³ with 15 classes, BraTS 4×128³ with 3, BTCV 1×96³ with 13, as the paper counts (no background), but where
a setting says how many; 96³ and 192³ are AMOS on other patches. FLOPs in billions: "exact" and "paper" are the
conventions of dstlib.profile. The first includes the products and the sampling of attention, which "attention" is the
sum of, the second leaves them out.
"""

from dataclasses import replace

import dstlib
from dstlib.profile import UNPARAMETRISED
from dstlib.report import align
from dstlib.zoo.e2enet import AMOS
from dstlib.zoo.e2enet.baselines import BASELINES, Baseline, Published, build_model

SETTINGS = {
    "AMOS": (1, 15, 128),
    "AMOS, 16 classes": (1, 16, 128),
    "BraTS": (4, 3, 128),
    "BTCV": (1, 13, 96),
    "BTCV at 128³": (1, 13, 128),
    "96³": (1, 15, 96),
    "192³": (1, 15, 192),
}  # channels, classes, extent
HEADER = ("name", "setting", "params", "published", "exact G", "paper G", "attention G", "published", "implementation")
Row = tuple[str, ...]


def measured(baseline: Baseline, published: Published) -> Row:
    """The row of a network that runs, in the setting of a published one."""
    channels, classes, extent = SETTINGS[published.setting]
    shape = (1, channels, extent, extent, extent)
    config = replace(AMOS, in_channels=channels, num_classes=classes)
    # built with storage first: Swin UNETR reads values while it is built
    network = build_model(
        baseline.name, in_channels=channels, num_classes=classes, patch_size=(extent,) * 3, config=config
    ).to("meta")
    exact, paper = (dstlib.profile(network, shape, convention=c) for c in ("exact", "paper"))
    attention = sum(row.flops or 0 for row in exact.layers if row.type in UNPARAMETRISED)
    return (
        baseline.name,
        published.setting,
        f"{exact.params:,}",
        text(published.params, " M"),
        f"{exact.flops / 1e9:,.2f}",
        f"{paper.flops / 1e9:,.2f}",
        f"{attention / 1e9:,.2f}" if attention else "-",
        text(published.flops, " G"),
        baseline.implementation,
    )


def text(number: float | None, unit: str) -> str:
    return "-" if number is None else f"{number}{unit}"


def rows() -> list[Row]:
    """One row per published count; a network of which there is none is named all the same."""
    table = []
    for baseline in BASELINES.values():
        if baseline.build is None or baseline.is_found:
            why = "not runnable" if baseline.build is None else f"{baseline.implementation}; as the search finds it"
            for p in baseline.published or (Published(setting="-", source="-"),):
                numbers = (text(p.params, " M"), "-", "-", "-", text(p.flops, " G"))
                table.append((baseline.name, p.setting, "-", *numbers, why))
        else:
            settings = baseline.published or (Published(setting="AMOS", source="-"),)
            table += [measured(baseline, published) for published in settings]
    return table


def main() -> None:
    """Prints the table, then the sources, and why some networks do not run."""
    print("\n".join(align([HEADER, *rows()], left=(0, 1, 8))))
    for baseline in BASELINES.values():
        for published in baseline.published:
            print(f"{baseline.name}, {published.setting}: {published.source}")
        if baseline.reason:
            print(f"{baseline.name}: not runnable: {baseline.reason}")


if __name__ == "__main__":
    main()
