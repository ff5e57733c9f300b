"""NIfTI files of any header, written number by number, and their places as SimpleITK and nibabel see them."""

from pathlib import Path

import nibabel
import numpy as np
from hypothesis import strategies as st

SHAPE = (3, 4, 5)  # x, y, z
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MM = 2  # the code


def write_nifti(
    file: Path, *, sform=None, qform=None, codes=(1, 1), shape=SHAPE, version=1, voxels=None, **fields
) -> Path:
    """Writes a file; ``codes`` are those of (sform, qform), ``fields`` are set last, by the names of the header."""
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header)()
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) if voxels is None else voxels
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    if qform is not None:
        header.set_qform(qform, 1, strip_shears=True)
    if sform is not None:
        header.set_sform(sform, 1)
    header["sform_code"], header["qform_code"] = codes
    header["xyzt_units"] = MM
    for name, value in fields.items():
        if name == "sizes":
            header["pixdim"][1:4] = value
        elif name == "qfac":
            header["pixdim"][0] = value
        else:
            header[name] = value
    head = header.binaryblock + bytes(header.single_vox_offset - header.sizeof_hdr)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(head + voxels.tobytes(order="F"))
    return file


def by_itk(file: Path) -> np.ndarray | None:
    """Returns the affine to RAS+ that SimpleITK sees; None where it refuses the file."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = SimpleITK.ReadImage(str(file))
    except RuntimeError:
        return None
    affine, dimension = np.eye(4), image.GetDimension()
    axes = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    affine[:3, :3], affine[:3, 3] = axes * image.GetSpacing()[:3], image.GetOrigin()[:3]
    return LPS_TO_RAS @ affine


def by_nibabel(file: Path) -> np.ndarray:
    return nibabel.load(file).affine


def turned(*angles: float) -> np.ndarray:
    """Returns a rotation about x, then y, then z, in degrees."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(angles)):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[[i, j, i, j], [i, j, j, i]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    return rotation


def placed(rotation=None, sizes=(1.0, 1.5, 2.0), origin=(10.0, -20.0, 30.0)) -> np.ndarray:
    """Returns an affine of these axes, sizes and origin."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) * np.array(sizes)
    affine[:3, 3] = origin
    return affine


def tilted(affine: np.ndarray, degrees: float = 16.0) -> np.ndarray:
    """Returns an affine whose z leans towards y, as of a CT with a tilted gantry: the slices are as far apart."""
    sheared = affine.copy()
    sheared[:3, 2] += (
        affine[:3, 1] / np.linalg.norm(affine[:3, 1]) * np.tan(np.radians(degrees)) * np.linalg.norm(affine[:3, 2])
    )
    return sheared


@st.composite
def affines(draw):
    """Draws axes in any direction, right- or left-handed, also along those of the patient, where most scans lie."""
    angles = st.sampled_from([0.0, 90.0, 180.0, -90.0]) | st.floats(-180, 180)
    rotation = turned(draw(angles), draw(angles), draw(angles))
    flips = [draw(st.sampled_from([1.0, -1.0])) for _ in range(3)]
    sizes = [draw(st.floats(0.1, 10)) for _ in range(3)]
    return placed(rotation * flips, sizes, [draw(st.floats(-500, 500)) for _ in range(3)])


@st.composite
def headers(draw):
    """Draws what :func:`write_nifti` takes: two forms that are the same or not, sheared, scaled, in any unit."""
    sform = draw(affines())
    kinds = ["same", "rounded", "other", "moved", "scaled", "sheared", "tilted"]
    qform, kind = sform, draw(st.sampled_from(kinds))
    if kind == "rounded":
        qform = sform + draw(st.floats(-1e-6, 1e-6))
    elif kind == "other":
        qform = draw(affines())
    elif kind == "moved":
        qform = sform.copy()
        qform[:3, 3] += [draw(st.floats(-100, 100)) for _ in range(3)]
    elif kind == "scaled":
        sform = sform @ np.diag([*(draw(st.floats(0.2, 5)) for _ in range(3)), 1.0])
    elif kind == "sheared":
        sform = sform @ (np.eye(4) + np.eye(4, k=1) * [0, draw(st.floats(1e-6, 0.3)), 0, 0])
    elif kind == "tilted":
        sform = tilted(sform, draw(st.floats(-30, 30)))
    chosen = {
        "sform": sform,
        "qform": qform,
        "xyzt_units": draw(st.sampled_from([0, 1, 2, 3, 10, 11])),
        "version": draw(st.sampled_from([1, 1, 1, 2])),
        "shape": draw(st.sampled_from([SHAPE, (3, 4, 1), (1, 2, 3), (3, 4, 5, 1), (3, 4, 5, 2)])),
    }
    if draw(st.booleans()):
        chosen["sizes"] = [draw(st.floats(0.1, 10)) for _ in range(3)]
    return chosen
