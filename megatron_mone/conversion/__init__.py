"""Models of Hugging Face folders as Megatron's: so far their shape (`megatron-mone inspect`).

    hf_config      a config.json, read with care; what nobody asked it for is told
    shape          parts that families share: decoder, attention, rope, experts
    families/      a file for each line of models that are stored alike
    inspect        a folder's model file for configs/model, and what it does not say
Needs neither torch nor transformers. May touch: the folder asked for, the file to write.
"""
