"""Benchmarks of a checkpoint with lm-evaluation-harness, on the ranks of any layout.

    words -> arguments -> model (loading) -> log-likelihoods of tokens (scoring, over all ranks)
          -> what lm-eval asks of a language model (language_model, rank 0) -> results -> compare

Rank 0 alone runs lm-eval and reads tasks; the other ranks compute what it asks for (service).
"""
