"""One model in DeepSparse, run by a Python that has it: a pass for each line that comes in.

python -m venv deepsparse && deepsparse/bin/pip install deepsparse==1.8.0
deepsparse/bin/python benchmarks/_deepsparse.py MODEL.onnx THREADS VOXELS
"""

import sys

import numpy as np
from deepsparse import Engine

path, threads, voxels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = Engine(path, batch_size=1, num_cores=threads)
image = [np.random.default_rng(0).standard_normal((1, 1, voxels, voxels, voxels), dtype=np.float32)]
engine.run(image)
print("ready", flush=True)
for _ in sys.stdin:
    engine.run(image)
    print("done", flush=True)
