"""Random calls of every op, held against float64 and against what an op may touch.

    PYTHONPATH=tests python -m fuzz cpu --seconds 60 --seed 1            # guard pages, canaries, forced kernels
    PYTHONPATH=tests python -m fuzz objects --seconds 60                 # what lies about its memory, and wrong types
    PYTHONPATH=tests python -m fuzz gpu --seconds 60                     # the calls of `cpu`, by torch on a GPU
    PYTHONPATH=tests python -m fuzz soak --seconds 600 --processes 12    # one GPU shared by many, eager and in graphs

A seed and an index make a case, so that a failure is run again alone by `--only SEED:INDEX`. `--resume STATE` goes on
where the last run of that file ended, and adds its counts to what the file holds.

For a GPU, `gpu` and `soak` also draw calls as large as those of models (drawing.py says why), whose float64 results the
GPU computes. So they take longer each, and need gigabytes of its memory: about two for each process of `soak`.

values.py draws numbers, layouts.py where tensors lie, cases.py a whole call of each op; expect.py says what it must
give; memory.py places it and watches the memory around; calls.py runs and judges it; objects.py is about what is no
honest tensor; campaign.py counts, and lives on when a case kills its process. Of the soak, program.py calls one case in
every way, attention.py draws and judges decode_attention, and soak.py shares the GPU among processes.
"""
