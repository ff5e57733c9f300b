"""The other side of `whole_scan.py`: one scan through nnU-Net's own predictor, in an environment that has nnunetv2.

    python benchmarks/_nnunet_scan.py JOB.json

JOB.json is written by `whole_scan.py`; the answer is a line of JSON. Nothing of dstlib is imported.
"""

import json
import os
import sys
from pathlib import Path
from time import perf_counter

ENVIRONMENT = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # nnU-Net warns where they are not set
NETWORK = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= dict.fromkeys(ENVIRONMENT, job["output"])
    if not job["torchvision"]:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    predictor, ends = make_predictor(job)
    start = perf_counter()
    predictor.predict_from_files_sequential([[job["image"]]], [job["output"] + "/scan"], overwrite=True)
    answer = {"seconds": perf_counter() - start, "ends": ends, "peak_bytes": peak()}
    assert Path(job["output"], "scan.nii.gz").is_file()
    print(json.dumps(answer))


def make_predictor(job):  # type: ignore[no-untyped-def]
    """nnU-Net's predictor with its network of random weights, and the times at which it begins a window."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    ends = []

    class Watched(nnUNetPredictor):
        def _internal_get_sliding_window_slicers(self, image_size):  # type: ignore[no-untyped-def]
            found = super()._internal_get_sliding_window_slicers(image_size)
            assert len(found) == job["num_windows"], f"{len(found)} windows, where the other side has another number"
            return found[: job["read"]]

        def _internal_maybe_mirror_and_predict(self, x):  # type: ignore[no-untyped-def]
            ends.append(perf_counter())  # of what it did with the window before
            return super()._internal_maybe_mirror_and_predict(x)

    plans = PlansManager(plans_of(job))
    configuration = plans.get_configuration("3d_fullres")
    labels = {"background": 0} | {f"class {number}": number for number in range(1, job["num_classes"])}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        job["num_classes"],
        deep_supervision=False,
    )
    predictor = Watched(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    weights = [network.state_dict()]
    predictor.manual_initialization(network, plans, configuration, weights, dataset, "nnUNetTrainer", None)
    return predictor, ends


def plans_of(job):  # type: ignore[no-untyped-def]
    """What nnU-Net's planner would write of a CT of this spacing: for a patch of 128³ five strides of 2."""
    intensities = {name: job[name] for name in ("mean", "std", "percentile_00_5", "percentile_99_5")}
    stages = 1 + len(job["strides"])
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset001_Scan",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": job["spacing"],
        "original_median_shape_after_transp": job["shape"],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities | {"min": 0.0, "max": 0.0, "median": 0.0}},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": job["patch"],
                "median_image_size_in_voxels": job["shape"],
                "spacing": job["spacing"],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
                "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
                "architecture": {
                    "network_class_name": NETWORK,
                    "arch_kwargs": {
                        "n_stages": stages,
                        "features_per_stage": [min(32 * 2**stage, 320) for stage in range(stages)],
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": [[3, 3, 3]] * stages,
                        "strides": [[1, 1, 1], *job["strides"]],
                        "n_conv_per_stage": [2] * stages,
                        "n_conv_per_stage_decoder": [2] * (stages - 1),
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
                "batch_dice": False,
            }
        },
    }


def peak() -> int:
    """The most bytes that this process held, without those of the one that started it, where the system tells."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
