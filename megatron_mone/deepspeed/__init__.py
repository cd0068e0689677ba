"""DeepSpeed as an engine: Megatron's model, data, schedule and log, stepped by DeepSpeed.

`--engine deepspeed` puts a `DeepSpeedEngine` where Megatron has its DDP wrapper and its optimizer
(`attach.PATCHES`); everything else of a run stays Megatron's and ours. Needs the package
`deepspeed`, which is imported where it is used.
"""
