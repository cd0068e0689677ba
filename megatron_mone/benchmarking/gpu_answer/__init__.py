"""What the first GPU at hand answers: `megatron-mone gpu-answer`. Not run on a GPU yet.

    plan.py          shapes and shares of the time, on a GPU and in the interpreter (--toy)
    given.py         inputs of a layer's kernels
    steps.py         the kernels of a layer one by one, each with its float64 check
    clock.py         times by CUDA graph replay
    experts.py       a layer's experts: dense, MoNE
    sections/        one file each; what they find goes to a `Notebook`
    notebook.py      a section's file, whole after every row
    conduct.py       runs the sections, each in a process of its own, and ends them in time
    report.py        Markdown
    carry.py         what a bare machine needs, as a folder

Knows kernels and common alone (and the dense baselines' activation): no megatron-core is needed.
"""
