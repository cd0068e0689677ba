"""What a job's operators and collectives take on its own nodes: `megatron-mone calibrate`.

    clock.py       seconds of a call that all ranks make at once
    arguments.py   torch's operators from the shapes in a trace
    operators.py   an operator, or what stands for it, as a call
    links.py       a collective as a call, over groups that sit as the layout's do
    ranks.py       the sections on a rank, each in its share of the time; times.json after a row
    small_steps.py a few layers of the model in the job's layout, by the profiler

Run on CPU ranks over gloo; not run on a GPU.
"""
