"""What dstlib computed before a change that is to change nothing: tests/test_golden.py holds it to these files.

``write.py`` writes them. They hold CRC-32s of tensors, in the order of their elements, in which -0 counts as 0:

    runs.json      every method in 50 steps of a small network: losses, masks, weights and momenta, each 10 steps
    state_v2.pt    model, optimizer and sparsifier of three of these runs after 20 steps; what goes on from there has
                   to reach the same
    engine.json    the engine's layers, ready and recorded, and gradients, for each instruction set
    checkpoint/    a run of the E2ENet recipe that was stopped, to be resumed
    trained/       the same run at its end, to predict with
    recipe.json    the masks and weights that it came to, and the labels that it predicts
    masks/         what other tools wrote, by ``masks/write.py``: no results of dstlib

**What may differ between machines.** Of the runs, nothing: all that they sum up are multiples of a power of two, and
small enough for float32 to hold them exactly in any order; torch draws whole numbers alike everywhere. The engine
differs by instruction set, and by the compiler, which decides where products and sums are fused: engine.json names
it. Gradients that torch computes in its place (inputs of strided convolutions, all weights of linear layers) are left
out. The recipe runs on torch's own convolutions: its weights and labels are those of one processor and one torch, which
recipe.json names; its masks should be the same on all.
"""
