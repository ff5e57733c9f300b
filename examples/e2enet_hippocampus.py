"""Train a sparse E2ENet on the hippocampus scans of the Medical Segmentation Decathlon (Task04).

    python examples/e2enet_hippocampus.py --data Task04_Hippocampus                      # DSFF, 80 % sparse
    python examples/e2enet_hippocampus.py --data Task04_Hippocampus --method static      # a mask that never moves
    python examples/e2enet_hippocampus.py --data Task04_Hippocampus --sparsity 0         # dense

Each takes about ten minutes on two idle CPU cores, and ends with the Dice of the held-out fifth of the scans.
--data wants the folder with dataset.json, imagesTr and labelsTr (http://medicaldecathlon.com, 27 MB).
"""

import sys

from dstlib.zoo.e2enet import E2ENetConfig
from dstlib.zoo.e2enet.data.cases import divide
from dstlib.zoo.e2enet.data.decathlon import read_decathlon
from dstlib.zoo.e2enet.data.normalization import normalize_mri
from dstlib.zoo.e2enet.data.patches import PatchSettings
from dstlib.zoo.e2enet.recipe import Recipe, follow, parser, run_command
from dstlib.zoo.e2enet.training.settings import TrainSettings

RECIPE = Recipe(
    name="e2enet_hippocampus",
    # Four levels rather than the paper's six: the scans are 36 × 50 × 35 voxels.
    network=E2ENetConfig(channels=(16, 32, 64, 96), strides=((2, 2, 2),) * 3, heads=3),
    # One patch holds a whole scan. No mirroring: front and back of the hippocampus are the classes.
    patches=PatchSettings(patch_size=(40, 56, 40), mirror=()),
    training=TrainSettings(epochs=32, iterations=25, learning_rate=0.05, momentum=0.9, interval=50),
)


def main() -> None:
    command_line = parser(__doc__, RECIPE)
    command_line.add_argument("--data", required=True, metavar="DIR", help="the folder of Task04_Hippocampus")
    command_line.add_argument(
        "--fold",
        type=int,
        default=0,
        help="which fifth to hold out, 0 to 4 (default: 0)",
    )
    options = command_line.parse_args()

    train_on, held_out = divide(read_decathlon(options.data).map(normalize_mri), fold=options.fold)
    follow(RECIPE, options, train_on=train_on, held_out=held_out)


if __name__ == "__main__":
    sys.exit(run_command(main))
