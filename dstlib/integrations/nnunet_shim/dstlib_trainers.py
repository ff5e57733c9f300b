"""The one file of the folder that ``nnUNet_extTrainer`` names: it hands nnU-Net the trainers of dstlib.

nnU-Net forgets the modules of such a folder after each search, so the trainers themselves live in the package.
"""

from dstlib.integrations.nnunet import trainer_named


def __getattr__(name: str) -> type:
    return trainer_named(name)
