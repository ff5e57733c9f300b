"""Train a sparse E2ENet on abdominal CT with the fifteen organs of AMOS: minutes on two CPU cores, no download.

    python examples/e2enet_amos.py                                  # DSFF, 80 % of the fusion's connections off
    python examples/e2enet_amos.py --method static                  # a random mask that never moves
    python examples/e2enet_amos.py --method dense                   # every connection
    python examples/e2enet_amos.py --run runs/a --sparsity 0.9      # where the results go, how sparse

The scans are procedural phantoms: they show that everything works, not how well it does on patients.
"""

import sys

from dstlib.zoo.e2enet import E2ENetConfig
from dstlib.zoo.e2enet.data.cases import divide
from dstlib.zoo.e2enet.data.normalization import normalize_ct
from dstlib.zoo.e2enet.data.patches import PatchSettings
from dstlib.zoo.e2enet.data.phantom import phantoms
from dstlib.zoo.e2enet.recipe import Recipe, follow, parser, run_command
from dstlib.zoo.e2enet.training.settings import TrainSettings

RECIPE = Recipe(
    name="e2enet_amos",
    # The paper's network has six levels of 48 to 320 channels; this one learns in minutes on a CPU.
    network=E2ENetConfig(channels=(16, 32, 64, 64), strides=((2, 2, 2),) * 3, heads=3),
    # Every patch is centred on an organ, each as likely as the others, or a short run never finds the small
    # ones. No mirroring, as left and right kidney are two classes; no augmentation, as phantoms are no scarcity.
    patches=PatchSettings(patch_size=(24, 32, 32), oversample=1.0, augment=False, mirror=()),
    training=TrainSettings(epochs=20, iterations=50, learning_rate=0.1, momentum=0.9, interval=100),
)


def main() -> None:
    command_line = parser(__doc__, RECIPE)
    command_line.add_argument(
        "--scans",
        type=int,
        default=30,
        help="how many to draw, at least 5 (default: %(default)s)",
    )
    options = command_line.parse_args()

    train_on, held_out = divide(phantoms(options.scans, seed=0))
    # A CT is normalised by the intensities of the training set, as Hounsfield units mean the same in every scan.
    normalize = normalize_ct(train_on.cases)
    follow(
        RECIPE,
        options,
        train_on=train_on.map(normalize),
        held_out=held_out.map(normalize),
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
